"""Engines: other places than this machine's own processes where `prepare` and `embed` do their work.

An engine is one module a command. Of `prepare` it replaces `Preparation.run`: it makes every `ShardJob` of `Preparation.begin` with
`write_shard`, anywhere and in any order. Of `embed` it replaces the model: it has `made_with` and `embed` as `OmniRetriever` does, and
yields the parts in the order of the records. Nothing else knows an engine, and no other package imports one but the command line.
"""
