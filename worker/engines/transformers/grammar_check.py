"""Whether a JSON schema can be compiled, found out in a process of its own: `python THIS_FILE < schema`.

A schema is a program of its sender's. Some take the compiler minutes (intersections of patterns), some end its process
(a long chain of references overflows the stack). What passes here, with less stack and time than an engine has, is
compiled there too. It imports nothing of rejoinder, so that it starts at once.
"""

import resource
import sys
import threading
from typing import TYPE_CHECKING

from llguidance import LLMatcher, LLParserLimits

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

OPTIONS: "JsonCompileOptions" = {
    "item_separator": ",",
    "key_separator": ":",
    "whitespace_flexible": True,
    "whitespace_pattern": r" |\n[ \t]{0,24}",  # bounded: a small model can go on with spaces until its tokens are spent
    "coerce_one_of": False,
    "lenient": False,
}
"""Override what a schema says itself (`x-guidance`): nothing that is not understood is ignored."""
STACK_BYTES = 2**20
"""A thread of the engine has twice this at least."""
CPU_SECONDS = 2
MEMORY_BYTES = 2 * 2**30


def limits() -> LLParserLimits:
    """What one step of a grammar may cost: some tens of milliseconds at worst."""
    return LLParserLimits(
        step_lexer_fuel=100_000,
        step_max_items=20_000,
        max_lexer_states=50_000,
        precompute_large_lexemes=False,
        verbose_errors=False,
    )


def fault(schema: str) -> str:
    """What is wrong with it; empty: nothing."""
    try:
        grammar = LLMatcher.grammar_from_json_schema(schema, overrides=OPTIONS)
    except ValueError as exc:
        return str(exc)
    return LLMatcher.validate_grammar(grammar, None, limits=limits())


def main() -> None:
    """Write the fault of the schema at standard input to standard output."""
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    schema = sys.stdin.buffer.read().decode()
    threading.stack_size(STACK_BYTES)
    thread = threading.Thread(target=lambda: sys.stdout.buffer.write(fault(schema).encode()))
    thread.start()
    thread.join()


if __name__ == "__main__":
    main()
