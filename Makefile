# Everything sets up what it needs: python3 if that has the three packages, else a .venv with them.
# PY=/path/to/python make ...   uses another one.
PACKAGES := torch torchvision pillow
NEW := import sys; sys.version_info >= (3, 10) or sys.exit("Python 3.10 or later is needed: PY=/path/to/python make ...")
HAVE := $(NEW); import importlib.util as u; sys.exit(not all(map(u.find_spec, ("torch", "torchvision", "PIL"))))
PY ?= $(shell python3 -c '$(HAVE)' 2>/dev/null && echo python3 || echo .venv/bin/python)
READY := $(if $(filter .venv/bin/python,$(PY)),.venv/ready)

DRAW := $(PY) ddpm.py sample --ckpt assets/mnist.pt --seed 4 --out

.PHONY: help sample train test test-slow bench figures assets clean

help:
	@echo "make sample      draw a five and its film, with the newest run or the net that came along"
	@echo "make train       train on MNIST for ten minutes, into runs/mnist"
	@echo "make test        run the tests: offline, on the CPU, in less than two minutes"
	@echo "make test-slow   run them with those that take minutes"
	@echo "make bench       measure training rate, memory and start-up on this machine"
	@echo "make figures     measure the README's figures that assets/figures.json lacks: up to two hours"
	@echo "make assets      draw the pictures of the README again, with the net that came along"
	@echo "make clean       remove pictures, caches and .venv, but no run and no data"

sample: $(READY)
	$(PY) ddpm.py sample --digit 5 --gif

train: $(READY)
	$(PY) ddpm.py train

test: $(READY)
	$(PY) -m unittest

test-slow: $(READY)
	SLOW=1 $(PY) -m unittest

bench: $(READY)
	BENCH=1 $(PY) -m unittest -q test_ddpm.Bench

figures: $(READY)
	FIGURES=1 $(PY) -m unittest -q test_ddpm.Figures

assets: $(READY)
	$(DRAW) assets/samples.png
	$(DRAW) assets/digits.png --digit 0 1 2 3 4 5 6 7 8 9 --gif
	$(DRAW) assets/same.png --digit 2 0 2 6 --style same --n 6
	$(DRAW) assets/free.png --digit 2 0 2 6 --n 6
	$(DRAW) assets/morph.png --morph 3 8 5
	for w in 0 1 3 8; do $(DRAW) assets/guidance-$$w.png --guidance $$w --digit 2 3 5 8 --n 3; done
	for k in 2 5 20; do $(DRAW) assets/steps-$$k.png --steps $$k --digit 2 3 5 8 --n 3; done
	$(DRAW) assets/steps-1000.png --sampler ddpm --digit 2 3 5 8 --n 3
	$(DRAW) assets/three.png --digit 3 --seed 6
	for s in 0 0.6 0.75 0.85; do $(DRAW) assets/restyle-$$s.png --init assets/three.png --strength $$s \
	  --digit 2 5 7 8 --guidance 3; done
	for s in linear cosine sigmoid; do \
	  $(PY) ddpm.py forward --dataset glyphs --schedule $$s --out assets/forward-$$s.png; done

clean:
	rm -rf .venv __pycache__ samples.png samples.gif noise.png noise.gif

.venv/ready:
	@echo "installing $(PACKAGES) into .venv: some minutes and GB, once"
	@python3 -c '$(NEW)'
	python3 -m venv .venv
	.venv/bin/python -m pip install --quiet $(PACKAGES)
	@touch $@
