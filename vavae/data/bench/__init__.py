"""``vavae bench data``: our readers beside others', in turns in one run, on equal outputs."""
