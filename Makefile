# `make demo` and `make test` set everything up by themselves; run again, they go straight to work.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
export OMP_NUM_THREADS ?= 1

.PHONY: help install demo test lint clean

help:
	@echo "make demo     train PPO-Lagrangian on SafetyPointGoal1-v0 and write an HTML report"
	@echo "make test     lint, type-check and run the tests"
	@echo "make install  set up $(VENV) (done by the two above when needed)"
	@echo "make lint     ruff and mypy alone"
	@echo "make clean    remove $(VENV) and caches"

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "saferl needs Python 3.11 or newer; name one with: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 1; }
	@echo "setting up $(VENV) (a few minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@{ $(PIP) install --constraint constraints.txt setuptools wheel torch \
	  && $(PIP) install --constraint constraints.txt --no-build-isolation --editable ".[control,diffusion,driving,test,dev]" \
	  && $(PIP) install --no-deps safety-gymnasium==1.0.0; } > $(VENV)/install.log 2>&1 || \
	  { cat $(VENV)/install.log; echo "the installation failed; the lines above say why"; exit 1; }
	@# Not every Python has a wheel of PyBullet, and compiling it takes long.
	@{ $(PIP) install --constraint constraints.txt --only-binary pybullet pybullet \
	  && $(PIP) install --no-deps bullet-safety-gym==1.4.0; } >> $(VENV)/install.log 2>&1 || \
	  echo "without Bullet-Safety-Gym: it needs PyBullet, which failed to install (see $(VENV)/install.log)"
	@touch $@

DEMO_RUN := runs/demo-$(shell date +%Y%m%d-%H%M%S)
# About a minute and a half; the published budget is ten times as long.
DEMO_OPTIONS := --total-steps 1000000 --num-envs 20 --epochs 5 --batch-size 500 \
  --cost-window 20 --multiplier-optimizer sgd --multiplier-lr 0.003

demo: install
	@echo "PPO-Lagrangian on SafetyPointGoal1-v0, a minute or two; Ctrl-C stops it and keeps what was learned"
	@$(BIN)/saferl train ppo-lag --env SafetyPointGoal1-v0 --run $(DEMO_RUN) $(DEMO_OPTIONS)
	@$(BIN)/saferl report $(DEMO_RUN)

lint: install
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/mypy

test: lint
	@$(BIN)/python -m pytest $(PYTEST_OPTIONS)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
