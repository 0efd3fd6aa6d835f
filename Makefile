# make demo, make test, make wheel: each does all of its set-up.

.PHONY: demo test wheel clean

demo:
	@bash scripts/setup.sh run
	@.venv/bin/python experiments/demo.py

test:
	@bash scripts/setup.sh test
	@.venv/bin/python -m pytest $(ARGS)

wheel:
	@bash scripts/wheel.sh

clean:
	rm -rf .venv .venv-* build dist runs .cache
