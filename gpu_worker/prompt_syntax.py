"""Which prompts hold Compel's syntax, and Compel's reading of them.

A prompt without any of its operators or escapes is plain: parentheses and quotes are text
then. Compel's own parser drops those, and takes a time for nested ones that grows without
bounds; both are put right here. Knows no pipeline.
"""

import functools
import re

import pyparsing
from compel.prompt_parser import Conjunction, FlattenedPrompt, PromptParser

from gpu_worker.failures import Refusal

SYNTAX = re.compile(
    r"""
      [)"] (?: [+-] | \.?\d )                        # (some words)1.2  "some words"++
    | [^\s()"+-] [+-]+ (?= [\s()",.+=-] | $ )        # word++  word-
    | \. (?: attend | swap | blend | and | add ) \s* \(
    | (?: use | with ) Lora \s* \(
    | \\ [()"]
    """,
    re.VERBOSE,
)

# Without a memory of what was tried, Compel's parser takes five times as long for each
# level of parentheses: four seconds for six levels. With it, twenty levels take 20 ms.
pyparsing.ParserElement.enable_packrat()


def needs_compel(text: str) -> bool:
    """Whether a prompt holds Compel's syntax. Its length is another question."""
    return SYNTAX.search(text) is not None


@functools.lru_cache(maxsize=64)
def parsed(text: str) -> Conjunction:
    """Compel's reading of a prompt; one without syntax is itself, parentheses and all.

    Raises Refusal for what is not a prompt, or asks Compel for what it does not do.
    """
    if not needs_compel(text):
        return _whole(text)
    try:
        conjunction = PromptParser().parse_conjunction(text)
    except (PromptParser.ParsingException, pyparsing.ParseBaseException) as error:
        raise _unreadable(str(error)) from error
    except (RecursionError, ValueError, IndexError, AssertionError) as error:
        raise _unreadable("it is nested too deeply, or an operator lacks its numbers") from error
    if conjunction.lora_weights:
        raise _unreadable("LoRAs are given in the field loras, not by withLora or useLora")
    if any(prompt.wants_cross_attention_control for prompt in conjunction.prompts):
        raise _unreadable(".swap is not supported")
    return conjunction if conjunction.prompts else _whole("")


def _whole(text: str) -> Conjunction:
    return Conjunction([FlattenedPrompt([(text, 1.0)])])


def _unreadable(reason: str) -> Refusal:
    return Refusal("invalid_request", f"cannot read the prompt: {reason}", "prompt")
