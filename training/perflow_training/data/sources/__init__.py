"""Where records come from: text, folders, tables and streams of `datasets`, tar shards; each with one interface."""
