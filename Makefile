# `make demo` and `make test` are the two commands to know. Each sets up .venv first when it is missing or out of date.
PYTHON ?=          # interpreter for .venv (3.10 to 3.13); empty: the first one found
WORKERS ?= 2       # processes that run the tests
FLAGS ?= slow      # flagged notebook cells that `make stress` runs, such as FLAGS="slow gpu"
NB ?=              # notebooks for `make notebooks`; empty: all

# Threads that wait let others run: where cores are shared, training is otherwise many times slower.
export OMP_WAIT_POLICY ?= passive

VENV := .venv
BIN := $(VENV)/bin
NATIVE := $(BIN)/python s4nb/build.py --quiet    # nothing to do: a twentieth of a second
PYTEST := OMP_NUM_THREADS=1 PYTHONHASHSEED=0 $(BIN)/python -m pytest -n $(strip $(WORKERS)) --dist worksteal
empty :=
space := $(empty) $(empty)

.PHONY: help demo test stress lab kernels bench book export notebooks readme lock clean clean-venv

help:
	@echo "make demo       train S4 on small ListOps on the CPU (under 5 minutes)"
	@echo "make test       every notebook, every test, every check of the house"
	@echo "make lab        read and run the book in JupyterLab"
	@echo "make kernels    compile the native kernels, and say what cannot be (S4NB_BUILD=auto|none|cpu|cuda)"
	@echo "make bench      measure what the kernels are worth, alone and in training, and how fast data arrive (many minutes)"
	@echo "make book       the book as HTML, in _docs"
	@echo "make stress     the notebooks' slow cells and the long tests"
	@echo "make export     notebooks -> modules, and clean the notebooks"
	@echo "make notebooks  execute notebooks in place (NB=path for some of them)"
	@echo "make readme     README.md from nbs/index.ipynb"
	@echo "make lock       pin new dependencies of settings.ini in constraints.txt"
	@echo "make clean      remove what was generated; clean-venv: .venv too"

$(VENV)/.installed: constraints.txt settings.ini setup.py .ci/setup
	@.ci/setup $(PYTHON)

demo: $(VENV)/.installed
	@$(NATIVE)
	@$(BIN)/s4nb train experiment=listops-mini

test: $(VENV)/.installed
	@$(NATIVE)
	@$(PYTEST) tests nbs

stress: $(VENV)/.installed
	@$(NATIVE)
	@$(PYTEST) tests nbs --flags "$(strip $(FLAGS))" -m "stress or $(subst $(space), or ,$(strip $(FLAGS)))"

lab: $(VENV)/.installed
	@$(NATIVE)
	@DATA_PATH="$${DATA_PATH:-$(CURDIR)/data}" $(BIN)/jupyter lab nbs/index.ipynb

kernels: $(VENV)/.installed
	@$(BIN)/python s4nb/build.py

bench: $(VENV)/.installed
	@$(NATIVE)
	@$(BIN)/s4nb bench
	@$(BIN)/python -m s4nb.bench_data
	@$(BIN)/python -m s4nb.bench_training

book: $(VENV)/.installed
	@$(BIN)/python .ci/book.py

export: $(VENV)/.installed
	@$(BIN)/nbdev_export && $(BIN)/nbdev_clean

notebooks: export
	@$(NATIVE)
	@$(BIN)/python .ci/execute.py $(NB)

readme: $(VENV)/.installed
	@$(BIN)/python .ci/readme.py

lock: $(VENV)/.installed
	@$(BIN)/python -m pip install -q uv -c constraints.txt
	@echo uv | $(BIN)/uv pip compile -q --refresh-package s4nb setup.py - --extra train --extra keops --extra book --extra dev -c constraints.txt \
		--universal --python-version 3.10 --no-header --no-annotate -o .lock
	@{ grep '^#' constraints.txt; cat .lock; } > .lock.new && mv .lock.new constraints.txt && rm .lock

clean:
	@rm -rf _docs _proc build dist *.egg-info s4nb/_C.* s4nb/_cuda.* .pytest_cache .hypothesis lightning_logs outputs multirun results/tmp
	@find s4nb nbs tests -name __pycache__ -o -name .ipynb_checkpoints | xargs rm -rf

clean-venv: clean
	@rm -rf $(VENV)
