"""Segment Anything for a segmentation: LoRA in its encoder, its decoder without prompts."""

import numpy as np
import pytest
import tensorflow as tf

import tfimm_lora as lora
from tests.helpers.kerases import BACKEND, LEGACY, array, keras, normal, run, values
from tests.helpers.mask_pictures import write_masks
from tfimm_lora.finetuning.base.dense import dense_base
from tfimm_lora.finetuning.base.opened import BaseModel
from tfimm_lora.finetuning.base_model import open_base_model
from tfimm_lora.finetuning.data.preprocessing import Preprocessing
from tfimm_lora.finetuning.recipe import Recipe, finetune_pictures
from tfimm_lora.model.classifier import classifier_paths

SIZE = 32


def make():
    """The model with prompts, with non-zero weights, and a model for four classes from it."""
    if LEGACY:
        from tests.helpers.tiny_architectures import ARCHITECTURES

        base = ARCHITECTURES["segment_anything"].make()
    else:
        import keras_hub

        from tests.helpers.keras_hub_models import sam

        base = keras_hub.models.SAMImageSegmenter(sam())
    for seed, variable in enumerate(base.weights):
        variable.assign(0.3 * normal(*variable.shape, seed=seed) + 0.05)
    return base, segmenter(base, 4)


def segmenter(base, classes):
    preprocessing = Preprocessing((SIZE, SIZE), (0.0,) * 3, (1.0,) * 3)
    opened = BaseModel(base, preprocessing, False, False, "")
    changed = dense_base(opened, classes)
    assert changed.new_classifier and not changed.returned_probabilities
    return changed.model


def parts(base):
    return base if LEGACY else base.backbone


def without_prompts(base, x):
    """All masks of the model, resized to the pictures: (n, h, w, masks)."""
    n = len(x)
    boxes, masks = ((n, 0, 4), (n, 0, 16, 16)) if LEGACY else ((n, 0, 2, 2), (n, 0, 16, 16, 1))
    shapes = {"points": (n, 0, 2), "labels": (n, 0), "boxes": boxes, "masks": masks}
    inputs = {"images": x, **{k: np.zeros(shape, "float32") for k, shape in shapes.items()}}
    if LEGACY:
        calls = [base(inputs, return_logits=True, multimask_output=m)[0] for m in (0, 1)]
        return np.concatenate([array(y) for y in calls], 1).transpose(0, 2, 3, 1)
    masks = array(base(inputs)["masks"]).transpose(0, 2, 3, 1)
    return array(keras.ops.image.resize(masks, (SIZE, SIZE)))


def decoder_of(model):
    return model.pixel_head if LEGACY else model.get_layer("pixel_head")


def tokens(decoder):
    """The variables that are new: the mask tokens, and the layers after them."""
    found = [v for mlp in decoder.output_hypernetworks_mlps for v in mlp.weights]
    return [*found, *([decoder.mask_tokens] if LEGACY else decoder.mask_tokens.weights)]


@pytest.mark.backends
def test_the_decoder_computes_the_masks_of_the_model_without_prompts():
    base, model = make()
    x = normal(2, SIZE, SIZE, 3)
    assert tuple(run(model, x).shape) == (2, SIZE, SIZE, 4)
    expected = without_prompts(base, x)
    assert expected.std() > 0.01
    assert np.abs(run(model, x) - expected).max() > 0.01  # the tokens are new
    for own, given in zip(tokens(decoder_of(model)), tokens(parts(base).mask_decoder)):
        own.assign(given)
    np.testing.assert_allclose(run(model, x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.backends
def test_the_encoder_is_adapted_and_the_decoder_trained(tmp_path):
    base, model = make()
    assert classifier_paths(model) == ["pixel_head"]
    x, y = normal(4, SIZE, SIZE, 3), np.zeros((4, SIZE, SIZE), "int32")
    y[:, 8:16], y[:, :4] = 3, -1
    lora.inject_lora(model, lora_rank=2, lora_train_classifier=True)
    names = {v.path if hasattr(v, "path") else v.name for v in model.trainable_weights}
    inside = {name for name in names if "pixel_head" in name}
    assert inside and all("lora" in name for name in names - inside)
    assert not any("gaussian" in name or "iou_prediction" in name for name in names)
    before, frozen = values(model.trainable_weights), values(model.non_trainable_weights)
    task = lora.Segmentation(tuple("abcd"))
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(2)
    lora.finetune(model, data, epochs=3, task=task, learning_rate=0.01, verbose="none")
    for old, new in zip(frozen, values(model.non_trainable_weights)):
        np.testing.assert_array_equal(old, new)
    after = values(model.trainable_weights)
    for variable, old, new in zip(model.trainable_weights, before, after):
        # The softmax ignores the bias of the keys, whose gradient is rounding noise, if any.
        name = variable.path if hasattr(variable, "path") else variable.name
        assert "k_proj/bias" in name or np.abs(new - old).max() > 0, name
    out = run(model, x)
    again = segmenter(base, 4)
    lora.save_adapter(model, tmp_path / "adapter")
    lora.load_adapter(again, tmp_path / "adapter")
    np.testing.assert_allclose(run(again, x), out, rtol=1e-4, atol=1e-5)
    regular = lora.convert_to_regular_model(model)
    np.testing.assert_allclose(run(regular, x), out, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not LEGACY, reason="of tfimm")
def test_the_factors_are_those_of_the_model_with_prompts():
    base, model = make()
    lora.inject_lora(model, lora_rank=2, lora_train_classifier=True)
    plain = lora.adapter_of(lora.inject_lora(base, lora_rank=2))
    assert lora.adapter_of(model).layers.keys() == plain.layers.keys()


@pytest.mark.skipif(not LEGACY, reason="of tfimm")
def test_without_a_segmentation_the_error_names_it():
    with pytest.raises(ValueError, match="no classifier.*--task segmentation"):
        open_base_model("sam_vit_b", classes=3, pretrained=False)


@pytest.mark.long
@pytest.mark.skipif(not LEGACY, reason="of tfimm")
def test_a_run_of_a_tfimm_model(tmp_path):
    check_run(tmp_path, model="sam_vit_b", pretrained=False, input_size=[SIZE, SIZE])


@pytest.mark.long
@pytest.mark.skipif(LEGACY or BACKEND != "tensorflow", reason="exports of keras_hub")
def test_a_run_of_a_preset(tmp_path):
    import keras_hub

    converter = keras_hub.layers.SAMImageConverter(image_size=(SIZE, SIZE), scale=1 / 255)
    base, _ = make()
    base.preprocessor = keras_hub.models.SAMImageSegmenterPreprocessor(converter)
    base.save_to_preset(str(tmp_path / "preset"))
    preset = str(tmp_path / "preset")
    with pytest.raises(ValueError, match=r"input_size=\(64, 64\).*expected \(32, 32\)"):
        open_base_model(preset, classes=3, dense=True, input_size=(64, 64))
    with pytest.raises(ValueError, match="--task segmentation") as caught:
        open_base_model(preset, classes=3)
    assert len(str(caught.value)) < 500
    check_run(tmp_path, model=preset)


def check_run(folder, **options):
    write_masks(folder / "data", n=8)
    settings = {"data": str(folder / "data"), "task": "segmentation", "epochs": 1}
    recipe = Recipe.from_dict({**settings, **options, "batch_size": 4})
    run_ = finetune_pictures(recipe, folder / "run", verbose="none")
    model = run_.model()
    x = normal(2, SIZE, SIZE, 3)
    lora.export(model, folder / "saved", format="savedmodel")
    serve = tf.saved_model.load(str(folder / "saved")).signatures["serving_default"]
    (given,) = serve(tf.constant(x)).values()
    np.testing.assert_allclose(given, run(model, x), rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="tfimm_lora"):
        lora.export(model, folder / "model.keras")
    assert not (folder / "model.keras").exists()
