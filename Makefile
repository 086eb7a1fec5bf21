# Each target sets up .venv by itself, and is quick the second time.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
# Four processes share the picture: on GPUs where there are four, else on the CPU.
DEMO_DEVICE ?= $(shell [ "$$(nvidia-smi -L 2>/dev/null | wc -l)" -ge 4 ] && echo auto || echo cpu)
SERVE_DEVICE ?= $(shell [ "$$(nvidia-smi -L 2>/dev/null | wc -l)" -ge 2 ] && echo auto || echo cpu)

.PHONY: install demo serve test lint check clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: install
	$(RUN) examples/text_to_image.py --ulysses-degree 2 --ring-degree 2 --device $(DEMO_DEVICE) \
		--prompt "a red circle on a blue background" --prompt "a small yellow star on a green background" \
		--seed 11 --output pictures

# A page to try it on, and an API for OpenAI's client. It prints its address.
serve: install
	$(RUN) -m omni_sp.server --ulysses-degree 2 --device $(SERVE_DEVICE) --warmup 256x256

test: install
	$(RUN) -m pytest

lint: install
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

check: lint test

clean:
	rm -rf $(VENV) pictures .pytest_cache .mypy_cache .ruff_cache
