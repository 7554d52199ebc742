# make demo   draws its own birds, trains on them, and measures what unseen sentences give
# make test   the tests
# make chaos  50 kills of commands at random moments, each then compared with one that was left alone: under 20 minutes
# make fuzz   100,000 hostile inputs for everything that reads a file: under 20 minutes
# All make .venv first and need nothing but Python 3.11+ and the package index.
PYTHON ?= python3
PY := .venv/bin/python

.PHONY: demo test chaos fuzz lint clean

.venv/ready: requirements.txt requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet -r requirements-dev.txt
	touch $@

demo: .venv/ready
	$(PY) data/toy_birds/prepare.py --count 720
	$(PY) char_cnn_rnn/main.py --train --dataset toy_birds --image_encoder scratch --lr 0.0002 --epochs 28
	$(PY) char_cnn_rnn/main.py --embed --dataset toy_birds
	$(PY) text2image/main.py --train --dataset toy_birds --epochs 2 --batch_size 16 --lr 0.0005 --l2_coef 500
	$(PY) benchmarks/color_accuracy.py

test: .venv/ready
	$(PY) -m pytest

chaos: .venv/ready
	$(PY) tests/chaos.py

fuzz: .venv/ready
	$(PY) tests/fuzz.py

lint: .venv/ready
	$(PY) -m ruff check .

clean:
	rm -rf .venv .pytest_cache .ruff_cache
