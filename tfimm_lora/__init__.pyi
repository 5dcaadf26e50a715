"""The public names, each with the module that defines it: the only list of them."""

from .adapters.adapter import Adapter as Adapter
from .adapters.combine import combination_errors as combination_errors
from .adapters.combine import combine_adapters as combine_adapters
from .adapters.compact import compact_adapter as compact_adapter
from .adapters.disable import disable_adapter as disable_adapter
from .adapters.disable import set_adapter_scale as set_adapter_scale
from .adapters.extract import extract_adapter as extract_adapter
from .adapters.layer_update import LayerUpdate as LayerUpdate
from .adapters.load import load_adapter as load_adapter
from .adapters.peft_targets import lora_arguments_from_peft as lora_arguments_from_peft
from .adapters.push_to_hub import push_to_hub as push_to_hub
from .adapters.save import adapter_of as adapter_of
from .adapters.save import save_adapter as save_adapter
from .adapters.translate_adapter import translate_adapter as translate_adapter
from .bank.bank import AdapterBank as AdapterBank
from .bank.prediction import RowPrediction as RowPrediction
from .config import LORA_WEIGHT_NAMES as LORA_WEIGHT_NAMES
from .config import LoRAConfig as LoRAConfig
from .create import create_model as create_model
from .create import list_models as list_models
from .explanations.explain import Explanation as Explanation
from .explanations.explain import explain as explain
from .exporting.export import export as export
from .exporting.exported import Exported as Exported
from .finetuning.data.augmentation import Augmentation as Augmentation
from .finetuning.data.batches import PictureBatches as PictureBatches
from .finetuning.data.dataset import Picture as Picture
from .finetuning.data.dataset import PictureSet as PictureSet
from .finetuning.data.dataset import Split as Split
from .finetuning.data.dataset import find_pictures as find_pictures
from .finetuning.data.pictures import check_pictures as check_pictures
from .finetuning.data.preprocessing import Preprocessing as Preprocessing
from .finetuning.evaluation import evaluate as evaluate
from .finetuning.mask_prediction import predict_masks as predict_masks
from .finetuning.metrics import Evaluation as Evaluation
from .finetuning.recipe import Recipe as Recipe
from .finetuning.recipe import finetune_pictures as finetune_pictures
from .finetuning.run import Run as Run
from .finetuning.tasks.classification import Classification as Classification
from .finetuning.tasks.multilabel import MultiLabel as MultiLabel
from .finetuning.tasks.regression import Regression as Regression
from .finetuning.tasks.segmentation import Segmentation as Segmentation
from .finetuning.training import Trained as Trained
from .finetuning.training import finetune as finetune
from .finetuning.tuning.learning_rate_finder import LearningRateCurve as LearningRateCurve
from .finetuning.tuning.learning_rate_finder import find_learning_rate as find_learning_rate
from .finetuning.tuning.pictures import tune_pictures as tune_pictures
from .finetuning.tuning.record import Tuned as Tuned
from .finetuning.tuning.record import TunedTrial as TunedTrial
from .finetuning.tuning.tune import tune as tune
from .layers import LoRAConv1D as LoRAConv1D
from .layers import LoRAConv2D as LoRAConv2D
from .layers import LoRAConv3D as LoRAConv3D
from .layers import LoRADense as LoRADense
from .layers import LoRADepthwiseConv2D as LoRADepthwiseConv2D
from .layers import LoRAEinsumDense as LoRAEinsumDense
from .layers import LoRAEmbedding as LoRAEmbedding
from .layers.base import LoRALayer as LoRALayer
from .layers.compiled import use_compiled_layers as use_compiled_layers
from .layers.conversion import convert_to_lora_layer as convert_to_lora_layer
from .layers.conversion import lora_class as lora_class
from .layers.conversion import register_layer_classes as register_layer_classes
from .layers.forms import use_form as use_form
from .model.checkpointing import (
    disable_gradient_checkpointing as disable_gradient_checkpointing,
)
from .model.checkpointing import (
    enable_gradient_checkpointing as enable_gradient_checkpointing,
)
from .model.convert import convert_to_lora_model as convert_to_lora_model
from .model.convert import convert_to_regular_model as convert_to_regular_model
from .model.explain_targets import explain_targets as explain_targets
from .model.inject import inject_lora as inject_lora
from .model.inject import remove_lora as remove_lora
from .model.merge import merge_lora_weights as merge_lora_weights
from .model.merge import merge_weights as merge_weights
from .model.merge import unmerge_lora_weights as unmerge_lora_weights
from .model.new_decoder import with_decoder as with_decoder
from .model.registry import lora_architecture as lora_architecture
from .model.registry import lora_base_architecture as lora_base_architecture
from .model.registry import lora_config as lora_config
from .model.registry import register_lora_architecture as register_lora_architecture
from .model.trainable_weights import lora_non_trainable_weights as lora_non_trainable_weights
from .model.trainable_weights import lora_trainable_weights as lora_trainable_weights
from .model.transfer import transfer_weights as transfer_weights
from .training.adalora import RankAllocator as RankAllocator
from .training.eva import initialize_eva as initialize_eva
from .training.loraplus import loraplus_optimizer as loraplus_optimizer
from .training.plan import Plan as Plan
from .training.plan import plan as plan
from .version import __version__ as __version__
from .zoo.lora_classes.cait import LoRACaiT as LoRACaiT
from .zoo.lora_classes.cait import LoRACaiTConfig as LoRACaiTConfig
from .zoo.lora_classes.convmixer import LoRAConvMixer as LoRAConvMixer
from .zoo.lora_classes.convmixer import LoRAConvMixerConfig as LoRAConvMixerConfig
from .zoo.lora_classes.convnext import LoRAConvNeXt as LoRAConvNeXt
from .zoo.lora_classes.convnext import LoRAConvNeXtConfig as LoRAConvNeXtConfig
from .zoo.lora_classes.efficientnet import LoRAEfficientNet as LoRAEfficientNet
from .zoo.lora_classes.efficientnet import LoRAEfficientNetConfig as LoRAEfficientNetConfig
from .zoo.lora_classes.mlp_mixer import LoRAMLPMixer as LoRAMLPMixer
from .zoo.lora_classes.mlp_mixer import LoRAMLPMixerConfig as LoRAMLPMixerConfig
from .zoo.lora_classes.pit import LoRAPoolingVisionTransformer as LoRAPoolingVisionTransformer
from .zoo.lora_classes.pit import (
    LoRAPoolingVisionTransformerConfig as LoRAPoolingVisionTransformerConfig,
)
from .zoo.lora_classes.poolformer import LoRAPoolFormer as LoRAPoolFormer
from .zoo.lora_classes.poolformer import LoRAPoolFormerConfig as LoRAPoolFormerConfig
from .zoo.lora_classes.pvt import LoRAPyramidVisionTransformer as LoRAPyramidVisionTransformer
from .zoo.lora_classes.pvt import (
    LoRAPyramidVisionTransformerConfig as LoRAPyramidVisionTransformerConfig,
)
from .zoo.lora_classes.pvt_v2 import (
    LoRAPyramidVisionTransformerV2 as LoRAPyramidVisionTransformerV2,
)
from .zoo.lora_classes.pvt_v2 import (
    LoRAPyramidVisionTransformerV2Config as LoRAPyramidVisionTransformerV2Config,
)
from .zoo.lora_classes.resnet import LoRAResNet as LoRAResNet
from .zoo.lora_classes.resnet import LoRAResNetConfig as LoRAResNetConfig
from .zoo.lora_classes.resnetv2 import LoRAResNetV2 as LoRAResNetV2
from .zoo.lora_classes.resnetv2 import LoRAResNetV2Config as LoRAResNetV2Config
from .zoo.lora_classes.segment_anything import (
    LoRASegmentAnythingModel as LoRASegmentAnythingModel,
)
from .zoo.lora_classes.segment_anything import (
    LoRASegmentAnythingModelConfig as LoRASegmentAnythingModelConfig,
)
from .zoo.lora_classes.swin import LoRASwinTransformer as LoRASwinTransformer
from .zoo.lora_classes.swin import LoRASwinTransformerConfig as LoRASwinTransformerConfig
from .zoo.lora_classes.vgg import LoRAVGG as LoRAVGG
from .zoo.lora_classes.vgg import LoRAVGGConfig as LoRAVGGConfig
from .zoo.lora_classes.vit import LoRAViT as LoRAViT
from .zoo.lora_classes.vit import LoRAViTConfig as LoRAViTConfig
from .zoo.weights.labels import class_names as class_names
from .zoo.weights.load import load_timm_weights as load_timm_weights
from .zoo.weights.preprocessing import create_preprocessing as create_preprocessing
from .zoo.weights.save import save_timm_weights as save_timm_weights
