"""The nouns that everything else uses: types, settings, results, errors, registry, cost, progress, TOML, run folder.

May import nothing else of this package.
"""
