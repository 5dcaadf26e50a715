"""LoRA for image models in TensorFlow/Keras: every Keras model, and all of tfimm.

Used as ``import tfimm_lora as lora``.
"""

import warnings as _warnings

from tfimm_lora.backend import (
    installed,
    prefer_legacy_for_tfimm,
    quiet_on_the_command_line,
    uses_legacy_keras,
)

prefer_legacy_for_tfimm()
quiet_on_the_command_line()

from tfimm_lora.adapters.adapter import Adapter
from tfimm_lora.adapters.combine import combination_errors, combine_adapters
from tfimm_lora.adapters.compact import compact_adapter
from tfimm_lora.adapters.disable import disable_adapter, set_adapter_scale
from tfimm_lora.adapters.extract import extract_adapter
from tfimm_lora.adapters.layer_update import LayerUpdate
from tfimm_lora.adapters.load import load_adapter
from tfimm_lora.adapters.mixed_batch import (
    adapter_ids,
    attach_adapters,
    detach_adapters,
    routed_model,
    use_adapters,
)
from tfimm_lora.adapters.peft_targets import lora_arguments_from_peft
from tfimm_lora.adapters.push_to_hub import push_to_hub
from tfimm_lora.adapters.save import adapter_of, save_adapter
from tfimm_lora.config import LORA_WEIGHT_NAMES, LoRAConfig
from tfimm_lora.create import create_model, list_models
from tfimm_lora.exporting import Exported, export
from tfimm_lora.finetuning.data.augment import Augmentation
from tfimm_lora.finetuning.data.batches import PictureBatches
from tfimm_lora.finetuning.data.dataset import Picture, PictureSet, Split, find_pictures
from tfimm_lora.finetuning.data.pictures import check_pictures
from tfimm_lora.finetuning.data.preprocessing import Preprocessing
from tfimm_lora.finetuning.evaluation import evaluate
from tfimm_lora.finetuning.recipe import Recipe, finetune_pictures
from tfimm_lora.finetuning.run import Run
from tfimm_lora.finetuning.scores import Evaluation
from tfimm_lora.finetuning.training import Trained, finetune
from tfimm_lora.layers import (
    LoRAConv1D,
    LoRAConv2D,
    LoRAConv3D,
    LoRADense,
    LoRADepthwiseConv2D,
    LoRAEinsumDense,
    LoRAEmbedding,
    LoRALayer,
    convert_to_lora_layer,
    lora_class,
    register_layer_classes,
)
from tfimm_lora.layers.forms import use_form
from tfimm_lora.model.convert import convert_to_lora_model, convert_to_regular_model
from tfimm_lora.model.explain_targets import explain_targets
from tfimm_lora.model.inject import inject_lora, remove_lora
from tfimm_lora.model.merge import merge_lora_weights, unmerge_lora_weights
from tfimm_lora.model.registry import (
    lora_architecture,
    lora_base_architecture,
    lora_config,
    register_lora_architecture,
)
from tfimm_lora.model.trainable_weights import (
    lora_non_trainable_weights,
    lora_trainable_weights,
)
from tfimm_lora.model.transfer import transfer_weights
from tfimm_lora.training.adalora import RankAllocator
from tfimm_lora.training.eva import initialize_eva
from tfimm_lora.training.loraplus import loraplus_optimizer
from tfimm_lora.training.plan import Plan, plan
from tfimm_lora.version import __version__
from tfimm_lora.zoo.weights import create_preprocessing, load_timm_weights

merge_weights = merge_lora_weights

__all__ = [
    "LORA_WEIGHT_NAMES",
    "Adapter",
    "Augmentation",
    "Evaluation",
    "Exported",
    "LayerUpdate",
    "LoRAConfig",
    "LoRAConv1D",
    "LoRAConv2D",
    "LoRAConv3D",
    "LoRADense",
    "LoRADepthwiseConv2D",
    "LoRAEinsumDense",
    "LoRAEmbedding",
    "LoRALayer",
    "Picture",
    "PictureBatches",
    "PictureSet",
    "Plan",
    "Preprocessing",
    "RankAllocator",
    "Recipe",
    "Run",
    "Split",
    "Trained",
    "__version__",
    "adapter_ids",
    "adapter_of",
    "attach_adapters",
    "check_pictures",
    "combination_errors",
    "combine_adapters",
    "compact_adapter",
    "convert_to_lora_layer",
    "convert_to_lora_model",
    "convert_to_regular_model",
    "create_model",
    "create_preprocessing",
    "detach_adapters",
    "disable_adapter",
    "evaluate",
    "explain_targets",
    "export",
    "extract_adapter",
    "find_pictures",
    "finetune",
    "finetune_pictures",
    "initialize_eva",
    "inject_lora",
    "list_models",
    "load_adapter",
    "load_timm_weights",
    "lora_architecture",
    "lora_arguments_from_peft",
    "lora_base_architecture",
    "lora_class",
    "lora_config",
    "lora_non_trainable_weights",
    "lora_trainable_weights",
    "loraplus_optimizer",
    "merge_lora_weights",
    "merge_weights",
    "plan",
    "push_to_hub",
    "register_layer_classes",
    "register_lora_architecture",
    "remove_lora",
    "routed_model",
    "save_adapter",
    "set_adapter_scale",
    "transfer_weights",
    "unmerge_lora_weights",
    "use_adapters",
    "use_form",
]

if uses_legacy_keras() and installed("tfimm"):
    # Also so that Keras knows the classes when it loads a saved model.
    try:
        from tfimm_lora.zoo import families as _architectures
    except ImportError as _error:  # tfimm is there, but something that it needs is not
        _warnings.warn(
            f"tfimm is installed but cannot be imported ({_error}); its architectures are "
            "not available.",
            stacklevel=2,
        )
    else:
        globals().update(
            {name: getattr(_architectures, name) for name in _architectures.__all__}
        )
        __all__ += _architectures.__all__
