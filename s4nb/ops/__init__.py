"The sums behind the kernels, Cauchy and Vandermonde, with their backends, and the long convolution. Nothing here knows of an SSM."
from s4nb.ops.convolution import long_conv
from s4nb.ops.cauchy_sum import backends, cauchy
from s4nb.ops.vandermonde_sum import log_vandermonde, log_vandermonde_transpose
