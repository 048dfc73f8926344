# Each target runs with python3, or PYTHON=/path, if that has the packages, else with a .venv made by it.
PACKAGES := "torch>=2.6" torchvision pillow
PYTHON ?= python3
NEW := import sys; sys.version_info >= (3, 10) or sys.exit("Python 3.10 or later is needed: make PYTHON=/path/to/python3 ...")
HAVE := $(NEW); from importlib.metadata import version as v; v("torchvision"), v("pillow"); sys.exit(tuple(map(int, v("torch").split(".")[:2])) < (2, 6))
PY ?= $(shell $(PYTHON) -c '$(HAVE)' 2>/dev/null && echo $(PYTHON) || echo .venv/bin/python)
READY := $(if $(filter .venv/bin/python,$(PY)),.venv/ready)
DATA ?= data
DRAW := $(PY) ddpm.py sample --ckpt assets/mnist.pt --seed 3 --out

.PHONY: help sample train test bench assets clean

help:
	@echo "make sample    draw a five and watch it come out of noise"
	@echo "make train     train on MNIST for ten minutes, into runs/mnist"
	@echo "make test      run the tests: offline, on the CPU, in about a minute"
	@echo "make bench     measure training rate, memory and start-up on this machine"
	@echo "make assets    draw the README's pictures again (DATA=folder with MNIST)"
	@echo "make clean     remove pictures, caches and .venv, but no run and no data"

sample train: $(READY)
	$(PY) ddpm.py $@ $(if $(filter sample,$@),--digit 5 --gif)

test: $(READY)
	$(PY) -m unittest

bench: $(READY)
	BENCH=1 $(PY) -m unittest -q test_ddpm.Bench

assets: $(READY)
	$(DRAW) assets/samples.png
	$(DRAW) assets/digits.png --digit 0 1 2 3 4 5 6 7 8 9 --gif
	$(DRAW) assets/same.png --digit 2 0 2 6 --same-style --n 6
	$(DRAW) assets/morph.png --morph 3 8 5
	$(DRAW) assets/three.png --digit 3 --seed 6
	$(DRAW) assets/redrawn.png --init assets/three.png --digit 2 5 7 8 --guidance 3
	set -e; for g in 0 1 3 8; do $(DRAW) assets/guidance-$$g.png --guidance $$g --digit 2 3 5 8 --n 3; done
	set -e; for k in 2 5 20; do $(DRAW) assets/steps-$$k.png --steps $$k --digit 2 3 5 8 --n 3; done
	set -e; for s in linear cosine; do \
	  $(PY) ddpm.py forward --data $(DATA) --schedule $$s --out assets/forward-$$s.png; done

clean:
	rm -rf .venv __pycache__ samples.png samples.gif noise.png noise.gif

.venv/ready:
	@echo 'installing $(PACKAGES) into .venv: some minutes and GB, once'
	@$(PYTHON) -c '$(NEW)'
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet $(PACKAGES)
	@touch $@
