"""The search: what is decided, what it costs, and how formats are chosen.

space        the decisions of a network: grouped, pinned; choices to formats and back
options      of decisions on formats: formats and pairs of them
groups       layers that share a decision, by name
assignments  formats given by hand or by a finished search, for each layer
quantities   what costs depend on, of each layer under choices
cost_models  hardware costs, registered by name
devices      peak rates and bandwidths of accelerators
latency      tables of measured times
budget       the range of costs that is reached, and the best choices within one
rewards      quality and cost as one number
controller   the interface of what is learned, and REINFORCE
critic       the additive model of the quality
strategies   how formats are found, one file each
single_changes   one decision in each of its formats, the others unquantized
measured_swaps   changes of an assignment that are measured around it
cheapest     the cheapest assignment that loses no more quality than it may

Besides the letters of the package's docstring, which hold everywhere: F decisions on
formats and A on sizes, N together; M layers that the L layers of a supernet can become.
"""
