# Every target makes its own environment in .venv from nothing but python3, once per change of the pins.
# pip takes the torch that its configuration offers; on Linux without a GPU, point it at a CPU build to keep the
# CUDA packages away.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
# -qq: quiet about the package folders that hold only some of the packages, not about errors.
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt

.PHONY: demo test lint docs bench torture

# One thread: on images of 8x8 more threads only wait for each other, for minutes where cores are busy.
demo: $(READY)
	@OMP_NUM_THREADS=1 $(BIN)/lightning-lowbit fit --config examples/configs/digits_tqt.yaml

test: $(READY)
	@$(BIN)/python -m pytest -n auto

lint: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/mypy

# The theme announces its own end of life at every build; that is no warning of ours.
docs: .venv/.docs
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict -q

.venv/.docs: $(READY)
	@$(PIP) -e '.[docs]'
	@touch $@

bench: $(READY)
	@$(BIN)/python benchmarks/qat_step.py
	@$(BIN)/python benchmarks/int8_training.py
	@$(BIN)/python benchmarks/binary_inference.py
	@$(BIN)/python benchmarks/inference.py

# Trains, kills -9 at random moments, resumes, and compares with a run that nobody disturbed. A PYTHON that is named
# runs it as it is, with the package's dependencies installed.
# Then lowers random networks, and verifies the programs.
KILLS ?= 5
GRAPHS ?= 200
SCHEMES ?= niti tqt bnn f8net jacinto wageubn
NAMED := $(findstring command,$(origin PYTHON))

torture: $(if $(NAMED),,$(READY))
	@PYTHONPATH=. $(if $(NAMED),$(PYTHON),$(BIN)/python) tests/torture.py --kills $(KILLS) --schemes $(SCHEMES)
	@PYTHONPATH=. $(if $(NAMED),$(PYTHON),$(BIN)/python) tests/torture_programs.py --graphs $(GRAPHS) --schemes $(SCHEMES)

# torch goes first and alone: nothing that depends on it may choose another build of it.
$(READY): pyproject.toml constraints.txt
	@echo "making .venv: pip installs torch, then the rest, without a word for some minutes"
	@$(PYTHON) -m venv .venv
	@$(PIP) torch
	@$(PIP) -e '.[dev]'
	@touch $@
