"""The subcommands, in the order of ``tfimm-lora --help``, and what it says about each."""

from __future__ import annotations

#: Module of this package -> the first sentence of its command's help. Importing the module
#: registers the command.
COMMANDS = {
    "models": "List the models that can be created by name.",
    "plan": "Show what LoRA would train in a model, and its memory, before any training.",
    "check": "Read all pictures and report everything that is wrong with them.",
    "finetune": "Fine-tune a model on labelled pictures; write an adapter and a report.",
    "evaluate": "Evaluate a fine-tuned model on labelled pictures.",
    "predict": "Print the most probable labels of pictures, with their probabilities.",
    "merge": "Merge the LoRA updates into the weights and write the ordinary model.",
    "export": "Export a model to a file that runs without this package.",
    "serve": "Predict pictures over HTTP: one base model in memory, and many adapters.",
    "demo": "Show a page in the browser: drop a picture, see the answer and why.",
    "inspect": "Show the layers of an adapter, with the norm and spectrum of each update.",
    "convert": "Write an adapter with the names of another library.",
    "combine": "Combine several adapters into one, as a weighted sum of their updates.",
    "diff": "Compare the settings, layers and updates of two adapters.",
}
