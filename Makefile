# make demo   render scenes, ask about them, build tiny models, extract, train probes, write demo/index.html (2 minutes)
# make test   all tests that need no GPU
# make bench  extract, streaming (9 GB of disk, given back), probes, lifting and questions, fp8, kernels, models at
#             their published sizes on a GPU (without one a check), and the grouping against its peers;
#             RECORD=--record writes benchmarks/results
# make lint   ruff; make sanitize: the C++ under address, undefined-behaviour and thread sanitizers; make clean
# All make .venv first, once: pinned dependencies (constraints.txt) and this package with its C++ extension.

PYTHON ?= python3
PIP := .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test bench lint sanitize clean

demo: .venv/installed
	.venv/bin/engine demo

test: .venv/installed
	.venv/bin/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

bench: .venv/installed
	$(PIP) --editable .[bench] --no-build-isolation
	.venv/bin/python -m pytest benchmarks $(RECORD)
	.venv/bin/python benchmarks/bench_kernels.py $(RECORD)
	.venv/bin/python benchmarks/bench_device.py $(RECORD)
	.venv/bin/python benchmarks/bench_grouping.py --big $(RECORD)

sanitize: .venv/installed
	for s in address,undefined thread; do \
	  PATH="$(CURDIR)/.venv/bin:$$PATH" cmake -G Ninja -S csrc -B build/check-$$s -DSPATIALPROBE_CHECKS=ON \
	    -DSPATIALPROBE_SANITIZE=$$s -DCMAKE_BUILD_TYPE=RelWithDebInfo && \
	  .venv/bin/cmake --build build/check-$$s && build/check-$$s/grouping_checks || exit 1; \
	done

lint: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

# torch first and alone: a plain machine must not get another build of it as some package's dependency.
.venv/installed: pyproject.toml constraints.txt $(wildcard csrc/* csrc/*/*)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version)'
	$(PYTHON) -m venv .venv
	$(PIP) torch==2.13.0
	$(PIP) scikit-build-core pybind11 cmake ninja
	$(PIP) --no-build-isolation --editable .[dev]
	touch .venv/installed

clean:
	rm -rf .venv build demo
