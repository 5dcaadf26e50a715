"""``BaseModel``: an opened model, with its preprocessing and the origin of its weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tfimm_lora.finetuning.data.preprocessing import Preprocessing

#: Named normalizations: mean and std of pictures in [0, 1].
NORMALISATIONS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "inception": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),  # to [-1, 1]
    "unit": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),  # to [0, 1]
    "raw": ((0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255)),  # keeps [0, 255]
}

Size = tuple[int, int] | None


@dataclass(frozen=True)
class BaseModel:
    """An ordinary model that returns logits, with its preprocessing.

    Attributes:
        model: The model.
        preprocessing: How pictures become its input.
        new_classifier: Whether the classifier was replaced for the requested number of classes.
        from_scratch: Whether the weights are random, so that the model cannot be recreated.
        weights: The origin of the weights, as the console and the report name it: "pretrained
            weights timm/resnet18.tv_in1k", "random weights", "weights of model.keras".
        returned_probabilities: Whether the saved model ended in a softmax or sigmoid, which was
            removed.
    """

    model: Any
    preprocessing: Preprocessing
    new_classifier: bool
    from_scratch: bool
    weights: str
    returned_probabilities: bool = False
