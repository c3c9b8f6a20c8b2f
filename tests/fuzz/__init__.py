"""A campaign of generated and mutated inputs; `python -m tests.fuzz --help`.

Each kind of input is a module with two functions:

    prepare(root) -> world                build or find what its cases share, in `root`
    case(world, chance, folder) -> str    write one input into `folder`, run it, say what came of it

`chance` is seeded with kind and seed alone. A case returns a word for the summary ("used", "refused" …). It raises
`Fault` where what it ran gave something wrong; a ListenError it lets out counts as a refusal, and must be one line.
"""
