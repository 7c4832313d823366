"""``vavae bench metrics``: our arithmetic of sets beside others', in turns in one run, on equal outputs."""
