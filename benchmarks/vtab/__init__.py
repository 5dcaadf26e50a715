"""VTAB-1k with ViT-B/16, as in V-PETL Bench: LoRA on 19 tasks of 1,000 pictures each.

    python -m benchmarks.vtab --data vtab-1k --out results --methods lora linear
    python -m benchmarks.vtab --out results --table

Run it from the root of the repository: with ``TF_USE_LEGACY_KERAS=1`` on legacy Keras, where
the model is tfimm's, or without on Keras 3, where it is keras_hub's. It needs one GPU. Each
task, method and seed has a JSON file in ``--out`` with the settings, all trials, the versions
and the device. An interrupted run continues, finished files are not run again, and other
settings are an error. ``--table`` prints all results beside the published values.

``--data`` has a folder for each task, as in the archives of VTAB-1k: pictures, and lists with
lines "path label" (``train800.txt``, ``val200.txt``, ``train800val200.txt``, ``test.txt``).
``--tfds`` writes missing folders with tensorflow_datasets; see ``from_tfds.py``.

``--lora NAME=VALUE ...`` sets fields of ``LoRAConfig``: ``--name dora --lora use_dora=True``,
or ``--name all --lora targets=all qkv=None``.

Protocol
--------

1. Each combination of learning rate, weight decay and alpha trains on ``train800.txt`` and is
   scored by the top-1 accuracy on ``val200.txt``, after the last epoch.
2. The best one trains on all 1,000 pictures, ``train800val200.txt``.
3. The result is the top-1 accuracy on the whole ``test.txt``, once, after the last epoch.

100 epochs, 10 of them warm-up, batches of 64 (the last one of an epoch is smaller), AdamW and a
cosine schedule. Pictures are resized to 224 x 224 by Pillow's bilinear filter, whatever their
aspect ratio, and normalized with mean and standard deviation of ImageNet. There is no
augmentation. The weights are those of the original ViT-B/16 on ImageNet-21k.

What is certain, and what is not
--------------------------------

V-PETL Bench is Xin et al., "V-PETL Bench: A Unified Visual Parameter-Efficient Transfer
Learning Benchmark", NeurIPS 2024. Its code is the folder ImageClassification of
github.com/synbol/Parameter-Efficient-Transfer-Learning-Benchmark. These are from it:

* batches, epochs and warm-up: ``configs/model_*/vtab``;
* resizing and normalization: ``dataloader/vtab.py``;
* LoRA of rank 8 and scale 1 in the query and value projections of all blocks:
  ``models/vision_transformer_lora.py``. 12 x 2 x 8 x (768 + 768) = 294,912 parameters beside
  the classifier, the 0.29 M of the paper.

Its weights are called ``ViT-B_16.npz``, the name of the original checkpoint. On the hub this is
``timm/vit_base_patch16_224.orig_in21k``; that both are equal was not checked.

The code differs from the protocol above, so the published values cannot be reproduced exactly:

* ``train/train_model_*.py`` evaluates on the test part every ten epochs and prints the best of
  these accuracies. That raises them. Here the test part is used once.
* ``scripts/run_vit_*.sh`` has a learning rate and a weight decay for each task. The code does
  not show how they were found. Here they are chosen on ``val200.txt``, from ``methods.py``.
* Some tasks have RandAugment or label smoothing of 0.1, and all have stochastic depth of 0.1.
  Models of Keras 3 have no stochastic depth, so none of these is used here.
* The rate falls to 1e-5, here to zero. Biases and normalizations are decayed, here not, as in
  ``lora.finetune``.
* The initialization of the whole model also replaces that of LoRA, so that A and B begin with a
  standard deviation of 0.02. Here B begins with zeros.

Its versions of full fine-tuning, linear and BitFit are not compared with ours in such detail.

The 1,000 pictures are the first ones of a data set, so they depend on its order. Archives that
others publish and folders written with ``--tfds`` may differ. The hash of the lists is in each
result.
"""
