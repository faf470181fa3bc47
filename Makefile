# The README's two commands are `make demo` and `make test`; each makes the environments that it needs.
PYTHON ?= python3
TORCH := torch==2.13.0
# The tests that take longest are marked `large`: `SLOW=1 make test` runs them too, as CI does.
LARGE := $(if $(SLOW),large or not large,not large)
UNIT_TESTS := tests/data tests/evaluation tests/family $(wildcard tests/test_*.py)

.PHONY: demo test test-all test-unit test-quick check test-newest test-optimum docs benchmark release clean

demo: .venv/ready
	.venv/bin/python examples/demo.py

test: check test-newest test-optimum

# What `.ci/run` runs.
test-all:
	$(MAKE) test SLOW=1

check: .venv/ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

test-newest: .venv/ready
	.venv/bin/python -m pytest -n 2 --dist worksteal -m "$(LARGE)"

# What depends on the version of transformers; the rest (tests/conftest.py) is the same in both.
test-optimum: .venv-optimum/ready
	.venv-optimum/bin/python -m pytest -n 2 --dist worksteal -m "not newest_only and ($(LARGE))"

# In about a minute: readers, metrics, the family, files and the layout.
test-unit: .venv/ready
	.venv/bin/python -m pytest -q -n 2 --dist worksteal -m "not slow" $(UNIT_TESTS)

# Without what takes long, in both environments.
test-quick: .venv/ready .venv-optimum/ready
	.venv/bin/python -m pytest -n 2 --dist worksteal -m "not slow"
	.venv-optimum/bin/python -m pytest -n 2 --dist worksteal -m "not slow and not newest_only"

# The documentation site: site/.
docs: .venv/ready
	.venv/bin/mkdocs build --strict

benchmark: .venv/ready
	.venv/bin/python benchmarks/post_processing.py
	.venv/bin/python benchmarks/loss.py
	.venv/bin/python benchmarks/end_to_end.py
	.venv/bin/python benchmarks/training_step.py 2
	.venv/bin/python benchmarks/mask2former.py 1
	.venv/bin/python benchmarks/scale.py 1
	.venv/bin/python benchmarks/folder.py 1

# Wheel and source distribution of the last commit, tried in an environment of their own: dist/.
release: .venv/ready
	.venv/bin/python -m tests.support.release $(TORCH)

# torch comes first and alone, so that nothing that follows asks for another build of it.
.venv/ready: setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --upgrade pip
	.venv/bin/python -m pip install --quiet $(TORCH)
	.venv/bin/python -m pip install --quiet --editable '.[dev]' 'transformers>=5,<6' $(TORCH)
	touch $@

.venv-optimum/ready: setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv-optimum
	.venv-optimum/bin/python -m pip install --quiet --upgrade pip
	.venv-optimum/bin/python -m pip install --quiet $(TORCH)
	.venv-optimum/bin/python -m pip install --quiet --editable '.[dev,optimum]' $(TORCH)
	touch $@

clean:
	rm -rf .venv .venv-optimum demo-output dist site
