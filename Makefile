# make demo, make test, make wheel: each does all of its set-up.

.PHONY: demo test wheel clean

# Test processes side by side; each takes up to 4 GB.
JOBS ?= 2

demo:
	@bash scripts/setup.sh run
	@.venv/bin/python experiments/demo.py

test:
	@bash scripts/setup.sh test
	@.venv/bin/python -m pytest -n $(JOBS) $(ARGS)

wheel:
	@bash scripts/wheel.sh

clean:
	rm -rf .venv .venv-* build dist runs .cache
