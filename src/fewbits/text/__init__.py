"""Everything between text and tokens: tokenizers, chat templates, sampling, grammars, streams, guesses ahead."""
