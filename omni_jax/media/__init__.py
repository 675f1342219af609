"""From a media file to arrays: sampled frames, a 16 kHz waveform, and the processes that keep a bad file from stopping a run."""
