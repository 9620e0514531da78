.PHONY: test lint bench plots

test:  ## needs pip install -e ".[test]"
	python -m pytest -q

lint:
	ruff check .
	ruff format --check .

bench:  ## GPT-2 124M with random weights; their values do not affect speed
	python bench/latency.py
	python bench/throughput.py
	python bench/training.py

plots:  ## draw the figures and write the tables of README.md and docs/ from bench/results/
	python bench/plot.py
	python bench/plot.py --readme
