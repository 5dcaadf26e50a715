"""Gradient checkpointing: the same training, with less kept for the backward pass."""

import copy

import numpy as np
import pytest

import tfimm_lora as lora
from tests.helpers.kerases import (
    BACKEND,
    LEGACY,
    array,
    keras,
    normal,
    randomise,
    run,
    sgd,
    weights_file,
)
from tfimm_lora.backend import backend_of

layers = keras.layers
CLOSE = dict(rtol=1e-5, atol=1e-6)


@keras.utils.register_keras_serializable("test_checkpointing")
class Block(layers.Layer):
    """A residual block with dropout."""

    def __init__(self, rate=0.0, norm="layer", **kwargs):
        super().__init__(**kwargs)
        self.rate = rate
        norms = {"layer": layers.LayerNormalization, "batch": layers.BatchNormalization}
        self.norm = norms[norm](name="norm")
        self.fc1 = layers.Dense(16, activation="gelu", name="fc1")
        self.drop = layers.Dropout(rate, seed=None if LEGACY else 7, name="drop")
        self.fc2 = layers.Dense(8, name="fc2")
        self.mlp = keras.Sequential([self.fc1, self.drop, self.fc2], name="mlp")

    def build(self, shape):
        self.norm.build(shape)
        self.mlp.build(shape)
        super().build(shape)

    def call(self, x, training=None, twice=False):
        # The name is known to AutoGraph and to those who read the arguments of the call.
        y = x + self.mlp(self.norm(x), training=training)
        return 2 * y if twice else y

    def get_config(self):
        return {**super().get_config(), "rate": self.rate}


class Implicit(Block):
    """Leaves it to Keras to tell the layers inside about training."""

    def call(self, x):
        return x + self.mlp(self.norm(x))


class Scaled(Block):
    """Has a weight of its own, which Keras casts in mixed precision."""

    def build(self, shape):
        super().build(shape)
        self.scale = self.add_weight(name="scale", shape=(8,), initializer="ones")

    def call(self, x, training=None):
        assert self.compute_dtype in str(self.scale.dtype)
        return self.scale * super().call(x, training=training)


@keras.utils.register_keras_serializable("test_checkpointing")
class Stage(layers.Layer):
    """Two blocks."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.blocks = [Block(name="block0"), Block(name="block1")]

    def build(self, shape):
        for block in self.blocks:
            block.build(shape)
        super().build(shape)

    def call(self, x):
        return self.blocks[1](self.blocks[0](x))


def model_of(make, count=2, **inject):
    entry = x = keras.Input((5, 8))
    for i in range(count):
        x = make(name=f"block{i}")(x)
    model = keras.Model(entry, layers.Dense(3, name="head")(x))
    lora.inject_lora(model, **{"lora_rank": 2, "lora_targets": "all", **inject})
    randomise(model)
    return model


DATA = normal(6, 5, 8), normal(6, 5, 3, seed=3)


def trained(model, **compiled):
    """The losses of a training, and the weights after it."""
    model.compile(sgd(0.05), "mse", **compiled)
    keras.utils.set_random_seed(3)
    history = model.fit(*DATA, batch_size=3, epochs=2, shuffle=False, verbose=0)
    return history.history["loss"], [array(v) for v in model.trainable_weights]


# On legacy Keras the numbers of dropout are others than without, see the next test.
@pytest.mark.parametrize("rate", [0.0] if LEGACY else [0.0, 0.5])
def test_training_is_the_same(rate):
    results = []
    for enabled in (False, True):
        keras.utils.set_random_seed(1)
        model = model_of(lambda name: Block(rate, name=name))
        if enabled:
            assert lora.enable_gradient_checkpointing(model) == ("block0", "block1")
        results.append(trained(model))
    np.testing.assert_allclose(results[1][0], results[0][0], **CLOSE)
    for one, two in zip(results[0][1], results[1][1]):
        np.testing.assert_allclose(two, one, **CLOSE)


@pytest.mark.parametrize("cls", [Block, Implicit])
def test_second_pass_draws_the_same_numbers(cls):
    """The gradient is that of the loss with the same dropout, by central differences."""
    model = model_of(lambda name: cls(0.5, name=name))
    lora.enable_gradient_checkpointing(model)
    model.compile(sgd(1.0), "mse")
    states = [v for v in model.non_trainable_variables if "seed" in v.name]
    before = [array(v).copy() for v in states]

    def loss_at(values, rate):
        for variable, value in zip(model.trainable_variables, values):
            variable.assign(value)
        for variable, value in zip(states, before):
            variable.assign(value)
        model.optimizer.learning_rate = rate
        keras.utils.set_random_seed(5)
        model.reset_metrics()  # which Keras 3.3 does not do itself
        return float(model.train_on_batch(*DATA))

    start = [array(v).copy() for v in model.trainable_variables]
    first = loss_at(start, 1.0)
    gradient = [a - array(v) for a, v in zip(start, model.trainable_variables)]
    assert loss_at(start, 0.0) == pytest.approx(first, rel=1e-6)
    length = np.sqrt(sum(np.sum(g**2) for g in gradient))
    assert length > 0.1
    ahead, behind = (
        loss_at([a + sign * 1e-2 / length * g for a, g in zip(start, gradient)], 0.0)
        for sign in (1, -1)
    )
    # The third derivative adds some 1e-4, and rounding 1e-7 / 1e-2.
    assert (ahead - behind) / 2e-2 == pytest.approx(length, rel=1e-3)


def kept(model):
    """The bytes that a training step keeps for its backward pass; on TensorFlow with others."""
    if BACKEND == "torch":
        import torch

        sizes = {}

        def pack(tensor):
            sizes[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(keras.ops.convert_to_tensor(DATA[0]), training=True)
        return sum(sizes.values())
    if BACKEND == "jax":
        return kept_by_jax(model)
    from tfimm_lora.finetuning.step_memory import step_bytes

    return step_bytes(model, (5, 8), 6)


def kept_by_jax(model):
    import jax

    frozen = [v.value for v in model.non_trainable_variables]

    def loss(trained):
        return model.stateless_call(trained, frozen, DATA[0], training=True)[0].sum()

    _, backward = jax.vjp(loss, [v.value for v in model.trainable_variables])
    residuals = jax.tree_util.tree_leaves(backward)
    return sum(x.nbytes for x in residuals if x.ndim > 2)  # not the weights


def test_less_is_kept_for_the_backward_pass():
    model = model_of(Block)
    plain = kept(model)
    lora.enable_gradient_checkpointing(model)
    # The input of each block instead of that, what the norm and GELU keep, and three products.
    # TensorFlow's figure is that of the whole step, with one block computed again.
    assert 0 < kept(model) < (0.7 if BACKEND == "tensorflow" else 0.6) * plain
    lora.disable_gradient_checkpointing(model)
    assert kept(model) == plain


@pytest.mark.skipif(BACKEND != "tensorflow", reason="the order of TensorFlow's operations")
def test_second_pass_waits_for_gradients_and_updates_wait_for_it():
    """Or all kernels would be formed at once, and weights changed before they are read."""
    import tensorflow as tf

    model = model_of(Block)
    lora.enable_gradient_checkpointing(model)

    @tf.function
    def step(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(model(x, training=True) ** 2)
        weights = [
            v if isinstance(v, tf.Variable) else v.value for v in model.trainable_weights
        ]
        return tape.gradient(loss, weights)

    traced = step.get_concrete_function(tf.constant(DATA[0]))
    for gradient in traced.graph.structured_outputs:
        source = gradient.op
        while source.type == "Identity" and not source.control_inputs:
            source = source.inputs[0].op
        assert source.control_inputs
    reads = [op for op in traced.graph.get_operations() if op.type == "ReadVariableOp"]
    late = [op.inputs[0].name for op in reads if op.control_inputs]
    assert len(set(late)) >= 2 * 2 * 3  # kernel, A and B of two layers in two blocks


def test_predictions_and_files_do_not_change(tmp_path):
    model = model_of(Block)
    before = run(model, DATA[0])
    lora.enable_gradient_checkpointing(model)
    np.testing.assert_array_equal(run(model, DATA[0]), before)
    model.save_weights(weights_file(tmp_path))
    other = model_of(Block)
    randomise(other, seed=1)
    other.load_weights(weights_file(tmp_path))
    np.testing.assert_allclose(run(other, DATA[0]), before, **CLOSE)
    lora.disable_gradient_checkpointing(model)
    lora.disable_gradient_checkpointing(model)
    assert "call" not in vars(model.get_layer("block0"))
    merged = lora.convert_to_regular_model(model)
    np.testing.assert_allclose(run(merged, DATA[0]), before, rtol=1e-4, atol=1e-5)


def test_other_arguments_of_a_block_arrive():
    model = model_of(Block)
    block, x = model.get_layer("block0"), DATA[0]
    expected = run(block, x, training=True, twice=True)
    lora.enable_gradient_checkpointing(model)
    np.testing.assert_allclose(run(block, x, training=True, twice=True), expected, **CLOSE)


@pytest.mark.parametrize("cls", [Block, Scaled])
def test_mixed_precision(cls, policy):
    policy("mixed_bfloat16")
    results = []
    for enabled in (False, True):
        keras.utils.set_random_seed(1)
        model = model_of(cls)
        if enabled:
            lora.enable_gradient_checkpointing(model)
        results.append(trained(model))
    # Rounding to 8 bits, in another order where a framework fuses operations.
    np.testing.assert_allclose(results[1][0], results[0][0], rtol=2**-7)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_stages_are_divided_into_blocks(dropout):
    model = model_of(Stage, lora_dropout=dropout)
    blocks = lora.enable_gradient_checkpointing(model)
    assert blocks == ("block0/block0", "block0/block1", "block1/block0", "block1/block1")
    chosen = lora.enable_gradient_checkpointing(model, blocks=["block1"])
    assert chosen == ("block1",)
    marked = [path for path in ("block0", "block1") if "call" in vars(model.get_layer(path))]
    assert marked == ["block1"]


@pytest.mark.skipif(not LEGACY, reason="tfimm needs legacy Keras")
@pytest.mark.parametrize(
    "name, blocks",
    [
        ("vit", "blocks/0 blocks/1"),
        ("mixer", "blocks/0 blocks/1"),  # with two MLPs each
        ("convnext", "stages/0 stages/1 stages/2/blocks/0 stages/2/blocks/1 stages/3"),
        ("resnetv2", "stages/0/blocks/0 stages/1/blocks/0"),  # with several convolutions each
    ],
)
def test_blocks_of_tfimm(name, blocks):
    from tests.helpers.tiny_architectures import ARCHITECTURES

    model = lora.inject_lora(ARCHITECTURES[name].make(), lora_rank=1)
    assert lora.enable_gradient_checkpointing(model) == tuple(blocks.split())


def test_models_without_blocks_and_wrong_paths_are_refused():
    entry = keras.Input((8,))
    plain = keras.Model(entry, layers.Dense(3, name="head")(layers.Dense(4)(entry)))
    with pytest.raises(ValueError, match="has no layers of one class with layers inside"):
        lora.enable_gradient_checkpointing(plain)
    model = model_of(Stage)
    for blocks, message in {
        ("nothing",): r"Received blocks=\['nothing'\].*Nearest first: ",
        (): r"Received blocks=\[\]",
        ("block0", "block0/block1"): "expected each layer once, and none inside another",
        ("block0", "block0"): "expected each layer once",
    }.items():
        with pytest.raises(ValueError, match=message):
            lora.enable_gradient_checkpointing(model, blocks=blocks)
    with pytest.raises(TypeError, match="blocks='block0'; expected a list"):
        lora.enable_gradient_checkpointing(model, blocks="block0")
    assert "call" not in vars(model.get_layer("block0"))


def test_batch_normalization_that_is_trained():
    def make(name):
        return Block(norm="batch", name=name)

    modules = ["block0/norm", "block1/norm"]
    model = model_of(make)
    lora.enable_gradient_checkpointing(model)
    trained(model)  # it is frozen
    results = []
    for enabled in (False, True):
        keras.utils.set_random_seed(1)
        model = model_of(make, lora_train_modules=modules)
        before = [array(v).copy() for v in model.non_trainable_weights]
        if enabled:
            lora.enable_gradient_checkpointing(model)
        if enabled and LEGACY:
            with pytest.raises(ValueError, match="'block0' .* changes a state with '.*Assign"):
                trained(model)
            return
        results.append(trained(model)[1] + [array(v) for v in model.non_trainable_weights])
        after = results[-1][-len(before) :]
        assert any(np.abs(a - b).max() > 0.01 for a, b in zip(after, before))
    for one, two in zip(*results):
        np.testing.assert_allclose(two, one, **CLOSE)


class Counting(Block):
    """Multiplies by a number that grows in every step."""

    def build(self, shape):
        super().build(shape)
        self.count = self.add_weight(
            name="count", shape=(), initializer="ones", trainable=False
        )

    def call(self, x, training=None):
        # torch assigns in place.
        y = super().call(x, training=training) * (self.count + 0.0)
        self.count.assign(self.count + 1)
        return y


def test_state_changes_once_in_each_step():
    results = []
    for enabled in (False, True):
        keras.utils.set_random_seed(1)
        model = model_of(Counting)
        if enabled:
            lora.enable_gradient_checkpointing(model)
        if enabled and LEGACY:
            with pytest.raises(ValueError, match="'block0' .* changes a state with"):
                trained(model)
            return
        results.append(trained(model))
        assert float(array(model.get_layer("block0").count)) >= 1 + 4
    np.testing.assert_allclose(results[1][0], results[0][0], **CLOSE)
    for one, two in zip(results[0][1], results[1][1]):
        np.testing.assert_allclose(two, one, rtol=1e-4, atol=1e-6 * np.abs(one).max())


def random_block(draw):
    """A block that adds random numbers of TensorFlow."""
    import tensorflow as tf

    class Random(Block):
        def call(self, x, training=None):
            return super().call(x, training=training) + draw(tf, x)

    return Random


def drawn_in_a_branch(tf, x):
    return tf.cond(tf.reduce_sum(x) > 0, lambda: tf.random.uniform(()), lambda: 0.0)


DRAWS = {
    "uniform": lambda tf, x: tf.random.uniform(tf.shape(x)),
    "generator": lambda tf, x: tf.random.get_global_generator().normal(tf.shape(x)),
    "branch": drawn_in_a_branch,
}


@pytest.mark.skipif(BACKEND != "tensorflow", reason="random operations of TensorFlow")
@pytest.mark.parametrize("eagerly", [False, True])
@pytest.mark.parametrize("draw", DRAWS)
def test_random_numbers_that_cannot_be_repeated_are_refused(draw, eagerly):
    model = model_of(random_block(DRAWS[draw]))
    lora.enable_gradient_checkpointing(model)
    with pytest.raises(ValueError, match="'block0' draws random numbers or changes a state"):
        trained(model, run_eagerly=eagerly)


@pytest.mark.skipif(LEGACY or BACKEND == "jax", reason="of Keras 3; JAX has it from the scope")
def test_seed_generators_of_other_layers_are_refused():
    seeds = keras.random.SeedGenerator(3)

    class Random(Block):
        def call(self, x, training=None):
            return super().call(x) + keras.random.uniform((1, 5, 8), seed=held[0])

    held = (seeds,)
    model = model_of(Random)
    lora.enable_gradient_checkpointing(model)
    with pytest.raises(ValueError, match="'block0' draws random numbers or changes a state"):
        model(to_tensor(DATA[0]), training=True)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="branches of TensorFlow")
def test_blocks_in_branches_are_refused():
    import tensorflow as tf

    class Branch(keras.Model):
        def __init__(self):
            super().__init__()
            self.block0, self.block1 = Block(name="block0"), Block(name="block1")

        def call(self, x, training=None):
            x = self.block0(x)
            return tf.cond(tf.reduce_sum(x) > 0, lambda: self.block1(x), lambda: x)

    model = Branch()
    model.block0.build((None, 5, 8))
    model.block1.build((None, 5, 8))
    model(DATA[0])
    lora.inject_lora(model, lora_rank=2, lora_targets="all")
    lora.enable_gradient_checkpointing(model)
    model.compile(sgd(), "mse")
    with pytest.raises(ValueError, match="'block1' is called in a tf.cond or a loop"):
        model.fit(DATA[0], DATA[0], verbose=0)


class Borrowing(Block):
    """Uses a layer that it does not own."""

    lent: tuple = ()

    def call(self, x, training=None):
        return super().call(x, training=training) + self.lent[0](x)


class Lending(keras.Model):
    def __init__(self):
        super().__init__()
        self.block0, self.block1 = Borrowing(name="block0"), Borrowing(name="block1")
        self.shared = layers.Dense(8, name="shared")
        self.head = layers.Dense(3, name="head")

    def build(self, shape=None):
        for block in (self.block0, self.block1):
            block.build((None, 5, 8))
            # A tuple in the dictionary is neither tracked nor saved.
            block.__dict__["lent"] = (self.shared,)
        self.shared.build((None, 5, 8))
        self.head.build((None, 5, 8))
        self.built = True

    def call(self, x):
        return self.head(self.block1(self.block0(x)))


def test_weights_that_a_block_does_not_own_have_gradients():
    results = []
    for enabled in (False, True):
        keras.utils.set_random_seed(1)
        model = Lending()
        model(DATA[0] if LEGACY else to_tensor(DATA[0]))
        lora.inject_lora(model, lora_rank=2, lora_targets="all")
        randomise(model)
        assert not any("shared" in path for path, _ in backend_of(model).walk(model.block0))
        if enabled:
            lora.enable_gradient_checkpointing(model)
        results.append(trained(model)[1])
    for one, two in zip(*results):
        np.testing.assert_allclose(two, one, **CLOSE)


@pytest.mark.skipif(BACKEND != "tensorflow" or LEGACY, reason="a tape around stateless_call")
def test_weights_of_a_stateless_call_have_gradients():
    import tensorflow as tf

    found = []
    for enabled in (False, True):
        keras.utils.set_random_seed(1)
        model = model_of(Block)
        if enabled:
            lora.enable_gradient_checkpointing(model)
        weights = [tf.constant(array(v)) + 0.1 for v in model.trainable_variables]
        others = [tf.constant(array(v)) for v in model.non_trainable_variables]
        with tf.GradientTape() as tape:
            tape.watch(weights)
            y, _ = model.stateless_call(weights, others, to_tensor(DATA[0]), training=True)
            loss = tf.reduce_sum(y**2)
        found.append(tape.gradient(loss, weights))
    for one, two in zip(*found):
        assert np.abs(one).max() > 0
        np.testing.assert_allclose(two, one, rtol=1e-4, atol=1e-4)


class WithNone(Block):
    """Returns the scores that it does not have, as attention layers do, and a number."""

    def call(self, x, training=None):
        return super().call(x, training=training), None, 3


class OfNone(keras.Model):
    def __init__(self):
        super().__init__()
        self.block0, self.block1 = WithNone(name="block0"), WithNone(name="block1")

    def call(self, x):
        for block in (self.block0, self.block1):
            x, scores, number = block(x)
            assert scores is None and number == 3
        return x


def test_blocks_may_return_other_values_than_tensors():
    model = OfNone()
    for block in (model.block0, model.block1):
        block.build((None, 5, 8))
    x = DATA[0] if LEGACY else to_tensor(DATA[0])
    model(x)
    lora.inject_lora(model, lora_rank=2, lora_targets="all")
    lora.enable_gradient_checkpointing(model)
    model.compile(sgd(), "mse")
    first = model.fit(DATA[0], DATA[0] + 1, epochs=3, verbose=0).history["loss"]
    assert first[-1] < first[0]


class Several(layers.Layer):
    """A block of several inputs, an integer among them, and nested outputs."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.one = keras.Sequential([layers.Dense(8, name="fc1")], name="one")
        self.two = keras.Sequential([layers.Dense(8, name="fc2")], name="two")

    def build(self, shape=None):
        self.one.build((None, 5, 8))
        self.two.build((None, 5, 8))
        self.built = True

    def call(self, x, other=None, factor=None):
        y = self.one(x)
        if other is not None:
            y = y + self.two(other)
        if factor is not None:
            y = y * backend_of(self).ops.cast(factor, y.dtype)[:, None, None]
        return {"x": y, "sums": (x + y, 2 * y)}


class OfSeveral(keras.Model):
    """Calls the second of its blocks twice."""

    def __init__(self):
        super().__init__()
        self.block0, self.block1 = Several(name="block0"), Several(name="block1")
        self.head = layers.Dense(3, name="head")

    def call(self, inputs):
        x, factor = inputs["x"], inputs["factor"]
        first = self.block0(x, other=2 * x, factor=factor)
        second = self.block1(first["x"], other=first["sums"][0])
        third = self.block1(second["x"] + second["sums"][1], factor=factor)
        return self.head(third["x"] + third["sums"][0])


@pytest.mark.parametrize("mode", ["run_eagerly", "jit_compile"])
def test_blocks_may_have_several_inputs_and_nested_outputs_and_be_called_twice(mode):
    if BACKEND != "tensorflow" and mode == "jit_compile":
        pytest.skip("as without on JAX, and torch.compile needs a compiler")
    factor = np.array([1, 2, 1, 1, 0, 2], "int32")
    inputs = {"x": 0.1 * DATA[0], "factor": factor}
    results = []
    for enabled in (False, True):
        keras.utils.set_random_seed(1)
        model = OfSeveral()
        tensors = inputs if LEGACY else keras.tree.map_structure(to_tensor, inputs)
        model(tensors)
        lora.inject_lora(model, lora_rank=2, lora_targets="all")
        randomise(model, size=0.05)
        if enabled:
            # Two Sequential make no stage.
            assert lora.enable_gradient_checkpointing(model) == ("block0", "block1")
        model.compile(sgd(0.001), "mse", **{mode: True})
        model.fit(inputs, DATA[1], batch_size=3, epochs=3, shuffle=False, verbose=0)
        results.append([array(v) for v in model.trainable_weights])
    for one, two in zip(*results):
        np.testing.assert_allclose(two, one, **CLOSE)


def to_tensor(x):
    return keras.ops.convert_to_tensor(x)


class Regularized(Block):
    """Adds a loss, by the activity of a layer."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.penalty = layers.ActivityRegularization(l2=0.1)

    def call(self, x, training=None):
        return self.penalty(super().call(x, training=training))


@pytest.mark.parametrize("precision", ["float32", "mixed_bfloat16"])
def test_layers_that_are_fully_trained_are_trained(precision, policy):
    policy(precision)
    moved = []
    for enabled in (False, True):
        keras.utils.set_random_seed(1)
        model = model_of(Block, lora_train_modules=["block0/fc2", "block1/fc2"])
        before = [array(v).copy() for v in model.trainable_weights]
        if enabled:
            lora.enable_gradient_checkpointing(model)
        moved.append([a - b for a, b in zip(trained(model)[1], before)])
    for one, two in zip(*moved):
        assert np.abs(one).max() > 0
        # Rounding to 8 bits, in another order.
        np.testing.assert_allclose(two, one, rtol=0.1, atol=0.05 * np.abs(one).max())


def test_masks_are_refused():
    entry = keras.Input((5, 8))
    x = layers.Masking()(entry)
    model = keras.Model(entry, Masked(name="block1")(Masked(name="block0")(x)))
    lora.inject_lora(model, lora_rank=2, lora_targets="all")
    lora.enable_gradient_checkpointing(model)
    model.compile(sgd(), "mse")
    with pytest.raises(ValueError, match="'block0' receives a mask"):
        model.fit(DATA[0], DATA[0], verbose=0)


class Masked(Block):
    """Passes masks on."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.supports_masking = True


def test_losses_in_blocks_are_refused():
    model = model_of(Regularized)
    lora.enable_gradient_checkpointing(model)
    with pytest.raises(ValueError, match="'block0' adds a loss in its call"):
        trained(model)
    lora.disable_gradient_checkpointing(model)
    trained(model)


@pytest.mark.skipif(not LEGACY, reason="the format of legacy Keras")
def test_saved_model_of_a_model_with_checkpointing(tmp_path):
    import tensorflow as tf

    model = model_of(Block)
    lora.enable_gradient_checkpointing(model)
    before = run(model, DATA[0])
    tf.saved_model.save(model, str(tmp_path / "saved"))
    np.testing.assert_array_equal(run(model, DATA[0]), before)
    served = tf.saved_model.load(str(tmp_path / "saved"))(DATA[0])
    np.testing.assert_allclose(array(served), before, **CLOSE)


@pytest.mark.skipif(not LEGACY, reason="layers of Keras 3 cannot be copied like this")
def test_a_deep_copy_computes_with_its_own_weights():
    model = model_of(Block)
    lora.enable_gradient_checkpointing(model)
    block = model.get_layer("block0")
    copied = copy.deepcopy(block)
    for variable in copied.weights:
        variable.assign(variable + 0.1)
    found = run(copied, DATA[0], training=True)
    assert np.abs(found - run(block, DATA[0], training=True)).max() > 0.1
    lora.disable_gradient_checkpointing(model)
    copied.__dict__.pop("call")
    np.testing.assert_allclose(found, run(copied, DATA[0], training=True), **CLOSE)


def test_a_call_of_the_user_is_left_alone():
    model = model_of(Block)
    block = model.get_layer("block1")
    block.__dict__["call"] = own = lambda x: x
    with pytest.raises(ValueError, match="whose layer 'block1' has a call that was set"):
        lora.enable_gradient_checkpointing(model)
    assert block.__dict__["call"] is own
    assert "call" not in vars(model.get_layer("block0"))


def test_models_that_are_not_built_are_refused():
    with pytest.raises(ValueError, match="which is not built"):
        lora.enable_gradient_checkpointing(OfSeveral())
