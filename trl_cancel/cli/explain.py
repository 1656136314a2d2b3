"""`trl-cancel explain`: what a configuration does, without loading or training anything."""

from ._quiet import quiet


def run(arguments: list[str]) -> int:
    with quiet():
        from ..explanation import explain
        from ..texts import plain
        from .settings import Parser

        parser = Parser("trl-cancel explain", "Say what a configuration does. Takes the settings of trl-cancel train.")
        parser.set_defaults(use_cpu=True)  # a recipe for a GPU is explained anywhere
        print(plain(explain(parser.read(arguments).training), lines=True))
    return 0
