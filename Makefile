# Each target runs with python3, or PYTHON=/path, if that has the packages, else with a .venv made by it.
PACKAGES := "torch>=2.6" torchvision pillow
PYTHON ?= python3
NEW := import sys; sys.version_info >= (3, 10) or sys.exit("Python 3.10 or later is needed: make PYTHON=/path/to/python3 ...")
HAVE := $(NEW); from importlib.metadata import version as v; v("torchvision"), v("pillow"); sys.exit(tuple(map(int, v("torch").split(".")[:2])) < (2, 6))
PY ?= $(shell $(PYTHON) -c '$(HAVE)' 2>/dev/null && echo $(PYTHON) || echo .venv/bin/python)
READY := $(if $(filter .venv/bin/python,$(PY)),.venv/ready)
DATA ?= data
DRAW := $(PY) ddpm.py sample --ckpt assets/mnist.pt --seed 3 --out

.PHONY: help sample train test evaluate bench assets clean

help:
	@echo "make sample    draw a five, and how it comes out of noise"
	@echo "make train     learn MNIST's digits, ten epochs, into runs/mnist"
	@echo "make test      run the tests: offline, on the CPU"
	@echo "make evaluate  are the digits right? [CKPT= N= SAMPLER= STEPS= GUIDANCE= DATA=]"
	@echo "make bench     how fast does the net learn on this machine?"
	@echo "make assets    draw the README's pictures again [DATA=folder with MNIST]"
	@echo "make clean     remove pictures, caches and .venv, but no run and no data"

sample train: $(READY)
	$(PY) ddpm.py $@ $(if $(filter sample,$@),--digit 5 --gif)

test: $(READY)
	$(PY) -m unittest

evaluate: $(READY)
	$(PY) -c 'import test_ddpm; test_ddpm.evaluate("$(or $(CKPT),auto)", $(or $(N),1000), "$(or $(SAMPLER),dpm)", $(or $(STEPS),0), $(or $(GUIDANCE),1.25), "$(DATA)")'

bench: $(READY)
	$(PY) -c 'import test_ddpm; test_ddpm.bench()'

assets: $(READY)
	$(DRAW) assets/samples.png --n 10
	$(DRAW) assets/digits.png --gif
	$(DRAW) assets/same.png --digit 2 0 2 6 --same-style --n 3
	set -e; for f in guidance-0 guidance-1 guidance-3 guidance-8 steps-2 steps-5 steps-20 sampler-ddpm; do \
	$(DRAW) assets/$$f.png --$${f%-*} $${f#*-} --digit 2 3 5 8 --n 3; done
	set -e; for s in linear cosine; do $(PY) ddpm.py forward --data $(DATA) --schedule $$s --out assets/forward-$$s.png; done

clean:
	rm -rf .venv __pycache__ samples.png samples.gif noise.png noise.gif

.venv/ready:
	@echo 'installing $(PACKAGES) into .venv: some minutes and GB, once'
	@$(PYTHON) -c '$(NEW)'
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet $(PACKAGES)
	@touch $@
