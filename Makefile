PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Tiny tensors: two processes with one thread each beat one with two.
PYTEST := OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q -n 2 --dist loadfile
STAMP := $(VENV)/.ready

.PHONY: book test execute export reproduce ladder parity speed student serve lab clean
book: $(STAMP)  ## render the book from the committed outputs
	$(BIN)/jupyter-book build . -W -n --keep-going

test: book  ## unit tests, then every chapter against its saved outputs
	$(PYTEST) tests
	$(PYTEST) --nbval chapters

execute: export  ## run the chapters in place (one: make execute CHAPTER=04)
	$(BIN)/python book/_tools/execute.py $(wildcard chapters/$(CHAPTER)*_*.ipynb)
	$(MAKE) export

export: $(STAMP)  ## write the package from the chapters
	$(BIN)/python book/_tools/export.py

reproduce: $(STAMP)  ## measure results/ again (one rung: make reproduce RUNG=scratch)
	$(BIN)/python book/_tools/reproduce.py $(RUNG)

ladder parity speed: $(STAMP)  ## print a table: the scores, our layers beside BERT's, the times
	$(BIN)/python -m tests.benchmarks.tables $@

student: $(STAMP)  ## a copy to fill in (whole chapters in it: make student DONE="01 02")
	$(BIN)/python book/_tools/student.py $(or $(STUDENT),student) $(DONE)

serve: book  ## read the book at http://localhost:8000
	$(BIN)/python -m http.server --directory _build/html --bind localhost 8000

lab: $(STAMP)  ## open the notebooks
	$(BIN)/jupyter lab chapters

clean:
	rm -rf _build chapters/.ipynb_checkpoints

$(STAMP): requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@
