"""Reports: results files in, one page out.

`read` reads results files and joins their rows to variants; `advice` says which of them to use, what is slower than it should be and what
is on the frontier; `document` is all of that as plain values, from which `html`, `markdown` and the terminal say the same. Nothing here
measures, and nothing depends on the clock: the same files give the same bytes.
"""
