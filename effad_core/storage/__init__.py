"""What lies on the disk.

* `files`: files that are written as a whole, and locks; `weights`: networks in them
* `teachers`: teachers in files, other implementations' too
* `digests`: what files hold, in 16 digits; `runs`: a training that can be interrupted
* `shipped`: what comes with the package
"""
