# Everything sets up what it needs: python3 if that has the three packages, else a .venv with them.
# PY=/path/to/python make ...   uses another one.
PACKAGES := torch torchvision pillow
HAVE := import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, ("torch", "torchvision", "PIL"))))
PY ?= $(shell python3 -c '$(HAVE)' 2>/dev/null && echo python3 || echo .venv/bin/python)
READY := $(if $(filter .venv/bin/python,$(PY)),.venv/ready)

.PHONY: help sample train test clean

help:
	@echo "make sample   draw a five and its film with the newest run (on a fresh clone: train one first)"
	@echo "make train    train on MNIST for ten minutes, into runs/mnist"
	@echo "make test     run the tests: offline, on the CPU, about a minute"
	@echo "make clean    remove pictures, caches and .venv, but no run and no data"

sample: $(READY)
	@ls runs/*/ddpm.pt >/dev/null 2>&1 || { \
	  echo "no trained net yet: two minutes of training on glyphs (printed digits) come first"; \
	  $(PY) ddpm.py train --dataset glyphs --minutes 2 --width 32; }
	$(PY) ddpm.py sample --digit 5 --gif

train: $(READY)
	$(PY) ddpm.py train

test: $(READY)
	$(PY) -m unittest

clean:
	rm -rf .venv __pycache__ samples.png samples.gif noise.png noise.gif

.venv/ready:
	@echo "installing $(PACKAGES) into .venv: some minutes and GB, once"
	python3 -m venv .venv
	.venv/bin/python -m pip install --quiet $(PACKAGES)
	@touch $@
