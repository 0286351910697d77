# SPDX-License-Identifier: Apache-2.0
# `make demo` and `make test` set up what they need in .venv by themselves; a second run starts at once.

PYTHON ?=
# Whose ROS 2: `wheels`, Jazzy's from PyPI in .venv, which are for x86-64 only; or `sourced`, the one of the shell's setup.bash.
ROS := $(if $(filter x86_64,$(shell uname -m)),wheels,sourced)
VENV := $(if $(filter wheels,$(ROS)),.venv,.venv-$(ROS))
BIN := $(VENV)/bin
# Extra arguments for every `pip install`, such as an index of your own.
PIP_FLAGS ?=
# Passed on: make demo DEMO="--seconds 8", make test TESTS="test/test_images.py -k bayer"
DEMO ?=
TESTS ?= test
# Without setuptools' warning about editable installs, which is not for users.
PIP := PYTHONWARNINGS=ignore $(BIN)/python -m pip --disable-pip-version-check install --progress-bar off -q $(PIP_FLAGS)

ifeq ($(ROS),wheels)
EXTRAS := ros,sim
# What a sourced setup.bash sets would mix that ROS with this one, and their libraries do not load together.
unexport RMW_IMPLEMENTATION
ifneq ($(ROS_DISTRO),)
unexport ROS_DISTRO PYTHONPATH LD_LIBRARY_PATH AMENT_PREFIX_PATH CMAKE_PREFIX_PATH COLCON_PREFIX_PATH
endif
else ifeq ($(ROS),sourced)
EXTRAS := sim
# The messages of Humble and Jazzy are compiled for numpy 1.
PINS := 'numpy<2'
else
$(error ROS=$(ROS): take wheels or sourced)
endif

.DEFAULT_GOAL := help
.PHONY: help demo test lint clean

help:  ## Show the targets.
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' Makefile

demo: $(VENV)/.stamp-demo $(VENV)/.stamp-rendering  ## Sample bag -> nodes -> report in out/demo/; simulated arm -> out/closed_loop/.
	$(BIN)/deeprob demo $(DEMO)
	@if [ -e $(VENV)/.stamp-rendering ]; then $(BIN)/deeprob demo --closed-loop; \
	else echo "the closed loop is left out: this machine cannot render"; fi

# A worker that dies ends the run: given work again, xdist 3.8.0 waits for ever for what was done already.
test: $(VENV)/.stamp-test $(VENV)/.stamp-rendering  ## Run the whole test suite.
	$(BIN)/python -m pytest -n 2 --max-worker-restart 0 $(TESTS)

lint: $(VENV)/.stamp-test  ## Check style and types.
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:  ## Remove the virtual environment, builds, caches and out/.
	rm -rf .venv .venv-sourced build install log out *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/.stamp-python: tools/setup.sh
	@PYTHON='$(PYTHON)' bash tools/setup.sh venv $(VENV) $(ROS)
	$(PIP) --upgrade pip
	@touch $@

$(VENV)/.stamp-demo: $(VENV)/.stamp-python setup.py
	@echo "installing the package with $(EXTRAS) from PyPI into $(VENV) (once, some minutes; no torch)"
	$(PIP) -e '.[$(EXTRAS)]' $(PINS)
	@touch $@

# torch==2.13.0 from PyPI brings CUDA along where no CPU build is at hand (PIP_FLAGS names an index that has one).
$(VENV)/.stamp-test: $(VENV)/.stamp-demo
	@echo "installing torch and the test tools into $(VENV) (once, some minutes)"
	$(PIP) -e '.[$(EXTRAS),train,test]' $(PINS)
	@touch $@

# MuJoCo draws with the system's EGL; the stamp is left only where it works, so that a later run looks again.
$(VENV)/.stamp-rendering: $(VENV)/.stamp-demo
	@bash tools/setup.sh rendering $(VENV) && touch $@ || true
