"""Keep matplotlib silent where no home can be written; import this before it.

It warns twice there, and then does with a temporary folder, which is as good.
"""

import logging

_HOME_WARNINGS = ("mkdir -p failed", "writable directory")

logging.getLogger("matplotlib").addFilter(lambda record: not any(words in str(record.msg) for words in _HOME_WARNINGS))
