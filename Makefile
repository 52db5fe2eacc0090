# Commands for a fresh machine:
#   make demo   train PFGM++ on handwritten digits and evaluate it (minutes on two cores)
#   make toy    three methods on points of the plane, and a page on what they do (a minute)
#   make test   lint, and the whole test suite
#   make gpu    builds, tests and measures what needs a GPU; a table of it goes into docs/
#   make cifar10 DATA=FILE   trains on CIFAR-10 for an hour on one GPU; a table of it goes into docs/
PYTHON  ?= python3
VENV    ?= .venv
WORKDIR ?= runs/demo
TOY     ?= heart
TOYS    ?= runs/toy_$(TOY)
CONFIG  ?= configs/pfgmpp/digits_demo.py
# processes that run the tests, of one thread each; files in their order: the long ones come early.
# Each start of Python would compile the program anew, were bytecode not kept.
WORKERS ?= 2
PIP      = $(VENV)/bin/python -m pip install --disable-pip-version-check --quiet

.PHONY: demo toy test gpu cifar10 lint format clean

demo: $(VENV)/.core
	$(VENV)/bin/python main.py --config $(CONFIG) --mode train --workdir $(WORKDIR)
	$(VENV)/bin/python main.py --config $(CONFIG) --mode eval --workdir $(WORKDIR)
	@echo
	@echo "Open $(WORKDIR)/eval/report.html in a browser. Next:"
	@echo "  make toy    # what the methods do, in the plane"
	@echo "  $(VENV)/bin/python main.py --mode sample --workdir $(WORKDIR) --config.sampling.film"
	@echo "  $(VENV)/bin/python main.py --config configs/pfgmpp/images16_ddpmpp.py --mode train" \
	    "--workdir runs/mine --config.data.path=FOLDER   # your own images"

# TOY=moons, swiss_roll, checkerboard, heart or eight_gaussians; the three at once, a thread each
toy: $(VENV)/.core
	$(MAKE) --jobs=3 toy-PFGM toy-PFGM++ toy-VP
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m reports.toy $(TOYS)/PFGM $(TOYS)/PFGM++ $(TOYS)/VP \
	    --out $(TOYS)/page.png --film $(TOYS)/film.webp

toy-PFGM: folder = poisson
toy-PFGM++: folder = pfgmpp
toy-VP: folder = vp
toy-%: $(VENV)/.core
	OMP_NUM_THREADS=1 $(VENV)/bin/python main.py --mode train --workdir $(TOYS)/$* \
	    --config configs/$(folder)/toy_mlp.py --config.data.dataset=$(TOY)

test: $(VENV)/.all
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(WORKERS) \
	    --dist loadfile --no-loadscope-reorder --durations=10

gpu: $(VENV)/.all
	$(VENV)/bin/python benchmarks/gpu.py

# DATA=FILE: the zip of EDM's dataset_tool.py, or the archive of CIFAR's authors
cifar10: $(VENV)/.all
	@test -f "$(DATA)" || { echo "make cifar10 DATA=FILE: cifar10-32x32.zip of EDM's" \
	    "dataset_tool.py, or cifar-10-python.tar.gz"; exit 2; }
	$(VENV)/bin/python benchmarks/cifar10.py "$(DATA)"

lint: $(VENV)/.all
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(VENV)/.all
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.core: requirements-core.txt | $(VENV)/bin/python
	@echo "installing what the demo needs into $(VENV) (once)"
	$(PIP) -r requirements-core.txt
	@touch $@

$(VENV)/.all: requirements.txt requirements-core.txt | $(VENV)/bin/python
	@echo "installing everything the tests need into $(VENV) (once)"
	$(PIP) -r requirements.txt
	@touch $@ $(VENV)/.core
