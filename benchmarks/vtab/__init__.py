"""VTAB-1k with ViT-B/16, as in V-PETL Bench: how good is LoRA on 19 tasks of 1,000 pictures?

    python -m benchmarks.vtab --data vtab-1k --out results --methods lora linear
    python -m benchmarks.vtab --out results --table

Run it from the root of the repository, with ``TF_USE_LEGACY_KERAS=1`` on legacy Keras (the model
is tfimm's) or without on Keras 3 (keras_hub's). One GPU is enough. Each task, method and seed has
a JSON file in ``--out`` with the settings, all trials, the versions and the device. A run that
was interrupted continues; finished files are not run again; other settings are an error.

The protocol (``protocol.py``)
------------------------------

1. Each setting of the grid (learning rate, weight decay, alpha) trains on the 800 pictures of
   ``train800.txt`` and is scored by the top-1 accuracy on the 200 of ``val200.txt``.
2. The best setting trains on all 1,000, ``train800val200.txt``.
3. The result is the top-1 accuracy after the last epoch on the whole test part, ``test.txt``,
   which is read once, after everything was chosen.

100 epochs, batches of 64 (the last one of an epoch is smaller), AdamW, 10 epochs of warm-up and a
cosine schedule. Pictures are resized straight to 224 x 224 with Pillow's bilinear filter, whatever
their aspect ratio, and normalized with mean and standard deviation of ImageNet. There is no
augmentation. The weights are those of the original ViT-B/16 on ImageNet-21k.

What is certain, and what is not
--------------------------------

V-PETL Bench is Xin et al., "V-PETL Bench: A Unified Visual Parameter-Efficient Transfer Learning
Benchmark", NeurIPS 2024; its code is github.com/synbol/Parameter-Efficient-Transfer-Learning-
Benchmark, folder ``ImageClassification``. From that code are: the batch size, the epochs and the
warm-up (``configs/*/vtab``), the resizing and the normalization (``dataloader/vtab.py``), and LoRA
of rank 8 and scale 1 in the query and value projections of all 12 blocks
(``models/vision_transformer_lora.py``): 12 x 2 x 8 x (768 + 768) = 294,912 parameters beside the
classifier, the 0.29 M of the paper. The name of its weights, ``ViT-B_16.npz``, is that of the
original ImageNet-21k checkpoint, which is ``timm/vit_base_patch16_224.orig_in21k`` on the hub.

The published numbers come from another procedure, so small differences mean nothing:

* The scripts for training (``train/train_model_*.py``) evaluate on the test part every tenth
  epoch and print the best of these values. Here the test part is used once.
* Learning rate and weight decay of each task are in ``scripts/run_vit_*.sh``; how they were found is
  not in the code. Here they are chosen on ``val200.txt``, from the grid in ``methods.py``.
* Some tasks are trained with RandAugment and with label smoothing of 0.1 there, and with stochastic
  depth of 0.1. Models of Keras 3 have no stochastic depth, so none of these is used here.
* The rate falls to 1e-5 there and to zero here; biases and normalizations are decayed there and
  not here, as in ``lora.finetune``.
* LoRA starts there with a nonzero update of the query projection, and with A = B = 0 for that of
  the value projection, which therefore gets no gradient. Here both are trained.

Full fine-tuning, linear and BitFit are the published methods as the literature defines them.

The 1,000 pictures are a subset by order, so they depend on the files. The archives that others
publish and the folders that ``from_tfds.py`` writes are not guaranteed to have the same ones; the
digest of the lists is part of the settings in each result.
"""
