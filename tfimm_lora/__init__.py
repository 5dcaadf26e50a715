"""LoRA for image models in TensorFlow/Keras: every Keras model, and all of tfimm.

Used as ``import tfimm_lora as lora``.
"""

import warnings as _warnings

from tfimm_lora import _keras

_keras.prefer_legacy_for_tfimm()
_keras.quiet_on_the_command_line()

from tfimm_lora.adapters.activation import disable_adapter, set_adapter_scale  # noqa: E402
from tfimm_lora.adapters.adapter import Adapter, LayerUpdate  # noqa: E402
from tfimm_lora.adapters.algebra import combination_errors, combine_adapters  # noqa: E402
from tfimm_lora.adapters.explain import extract_adapter  # noqa: E402
from tfimm_lora.adapters.extract import adapter_of, save_adapter  # noqa: E402
from tfimm_lora.adapters.hub import push_to_hub  # noqa: E402
from tfimm_lora.adapters.load import load_adapter  # noqa: E402
from tfimm_lora.adapters.peft_targets import lora_arguments_from_peft  # noqa: E402
from tfimm_lora.adapters.routing import (  # noqa: E402
    adapter_ids,
    attach_adapters,
    detach_adapters,
    routed_model,
    use_adapters,
)
from tfimm_lora.compaction import compact_adapter  # noqa: E402
from tfimm_lora.config import LORA_WEIGHT_NAMES, LoRAConfig  # noqa: E402
from tfimm_lora.convert import convert_to_lora_model, convert_to_regular_model  # noqa: E402
from tfimm_lora.eva import initialize_eva  # noqa: E402
from tfimm_lora.exporting import Exported, export  # noqa: E402
from tfimm_lora.factory import create_model, list_models  # noqa: E402
from tfimm_lora.finetuning.augment import Augmentation  # noqa: E402
from tfimm_lora.finetuning.data import Picture, PictureSet, Split, find_pictures  # noqa: E402
from tfimm_lora.finetuning.evaluation import evaluate  # noqa: E402
from tfimm_lora.finetuning.pictures import check_pictures  # noqa: E402
from tfimm_lora.finetuning.pipeline import PictureBatches  # noqa: E402
from tfimm_lora.finetuning.preprocessing import Preprocessing  # noqa: E402
from tfimm_lora.finetuning.recipe import Recipe, finetune_pictures  # noqa: E402
from tfimm_lora.finetuning.run import Run  # noqa: E402
from tfimm_lora.finetuning.scores import Evaluation  # noqa: E402
from tfimm_lora.finetuning.training import Trained, finetune  # noqa: E402
from tfimm_lora.inject import inject_lora, remove_lora  # noqa: E402
from tfimm_lora.layers import (  # noqa: E402
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
from tfimm_lora.layers.forms import use_form  # noqa: E402
from tfimm_lora.merge import merge_lora_weights, unmerge_lora_weights  # noqa: E402
from tfimm_lora.optimizers import loraplus_optimizer  # noqa: E402
from tfimm_lora.planning import Plan, plan  # noqa: E402
from tfimm_lora.rank_allocation import RankAllocator  # noqa: E402
from tfimm_lora.registry import (  # noqa: E402
    lora_architecture,
    lora_base_architecture,
    lora_config,
    register_lora_architecture,
)
from tfimm_lora.target_table import explain_targets  # noqa: E402
from tfimm_lora.trainability import (  # noqa: E402
    lora_non_trainable_weights,
    lora_trainable_weights,
)
from tfimm_lora.transfer import transfer_weights  # noqa: E402
from tfimm_lora.version import __version__  # noqa: E402
from tfimm_lora.weights import create_preprocessing, load_timm_weights  # noqa: E402

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

if _keras.uses_legacy_keras() and _keras.installed("tfimm"):
    # Also so that Keras knows the classes when it loads a saved model.
    try:
        from tfimm_lora import architectures as _architectures
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
