# make demo, make test, make wheel, make sanitize, make fuzz: each does all of its set-up.

.PHONY: demo test wheel sanitize fuzz clean

demo:
	@bash scripts/setup.sh run
	@.venv/bin/python experiments/demo.py

test:
	@bash scripts/setup.sh test
	@bash scripts/test.sh .venv $(ARGS)

sanitize:
	@bash scripts/sanitize.sh

# Headers of checkpoints for SECONDS, decodes as long.
SECONDS ?= 60
fuzz:
	@bash scripts/setup.sh test
	@.venv/bin/python tests/fuzz_headers.py $(SECONDS) $$(date +%s)
	@KJAX_FUZZ_SECONDS=$(SECONDS) bash scripts/sanitize.sh fuzz

wheel:
	@bash scripts/wheel.sh

clean:
	rm -rf .venv .venv-* build dist runs .cache
