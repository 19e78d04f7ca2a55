"""The one command: trains, evaluates, samples, serves, imports, exports.

    python launch.py --config=configs/quickstart.py --workdir=runs/quickstart
    python launch.py --mode=eval --workdir=runs/quickstart
    python launch.py --mode=sample --workdir=runs/quickstart --prompt='a {} b'
    python launch.py --mode=serve --workdir=runs/quickstart
    python launch.py --mode=compare --workdirs=runs/a,runs/b --output=cmp
    python launch.py --mode=import --from=FOLDER --workdir=runs/imported

Any setting can be changed: --config.model.num_layers=6. `--mode=MODE --help`
lists a mode's own flags. A config file is Python code: run only files that you
trust.
"""

from nanodlm.devices import hugepages

if __name__ == '__main__':
  hugepages.restart_with_huge_pages()  # Before imports that take time.

from nanodlm.__main__ import run

if __name__ == '__main__':
  run()
