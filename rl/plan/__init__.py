"""How much memory a run needs, before anything is loaded: `flowsteer plan`.

``files.py`` reads a model's configuration files, ``networks.py`` builds its networks without weights, ``inputs.py`` knows
what a denoiser is called with, ``count.py`` counts live bytes under fake tensors, ``settings.py`` reads the run's
configuration, ``parts.py`` adds up, ``advice.py`` says what would fit. GB are 1e9 bytes.
"""
