# `make help` lists the targets. All but help and clean first make .venv, from Python 3.11+ and the package index.
PYTHON ?= python3
PY := .venv/bin/python
SEED := 1

.DEFAULT_GOAL := help
.PHONY: help demo test extras lint chaos fuzz clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-6s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

.venv/ready: requirements.txt requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet -r requirements-dev.txt
	touch $@

demo: .venv/ready  ## draw toy birds, train on them, generate images for unseen sentences, measure them (SEED=2: others)
	@echo '--- 1 of 5: generate 1,800 birds with ten captions each'
	$(PY) data/toy_birds/prepare.py --count 1800 --seed $(SEED)
	@echo '--- 2 of 5: train the sentence encoder on birds and captions'
	$(PY) char_cnn_rnn/main.py --train --dataset toy_birds --image_encoder color_grid --variant birds_cvpr --lr 0.0005 --epochs 56 --seed $(SEED)
	@echo '--- 3 of 5: turn every caption into 1,024 numbers'
	$(PY) char_cnn_rnn/main.py --embed --dataset toy_birds
	@echo '--- 4 of 5: train the GAN; at the end, see text2image/output/toy_birds_DATE/samples/ (real images above)'
	$(PY) text2image/main.py --train --dataset toy_birds --epochs 1 --batch_size 32 --lr 0.001 --l2_coef 500 --int_coef 1 --average 0.98 --seed $(SEED)
	@echo '--- 5 of 5: generate images for sentences with color pairs that never occurred in training; measure the colors'
	$(PY) evaluation/color_accuracy.py
	@echo 'Try next:'
	@echo '  $(PY) text2image/main.py --train False --dataset toy_birds --count 8 --text "a purple bird on a branch with orange wings."'
	@echo '  $(PY) char_cnn_rnn/main.py --train False --dataset toy_birds --query "a white bird in flight with black wings."'
	@echo '  $(PY) text2image/main.py --train --dataset toy_birds --epochs 1 --batch_size 32 --lr 0.001 --l2_coef 0 --int_coef 1 --average 0.98'

test: .venv/ready  ## run the tests, with short forms of chaos and fuzz
	$(PY) -m pytest -n 2 --dist loadfile

extras: .venv/ready  ## install the optional packages of the page and of other encoders, and run their tests
	$(PY) -m pip install --quiet -r requirements-app.txt -r requirements-encoders.txt
	$(PY) -m pytest -n 2 tests/test_app.py tests/test_encoders.py

lint: .venv/ready  ## check the style with ruff
	$(PY) -m ruff check .

chaos: .venv/ready  ## interrupt commands at 50 random moments and compare with undisturbed ones (up to 20 minutes)
	$(PY) tests/chaos.py

fuzz: .venv/ready  ## give every file reader hostile input, 100,000 files in all (up to 20 minutes)
	$(PY) tests/fuzz.py

clean:  ## remove .venv and the caches of pytest and ruff
	rm -rf .venv .pytest_cache .ruff_cache
