# The real prometheus-sql-exporter and the real Prometheus, with the files of doc/monitoring/, only faster:
#
#	my $exporter = OmniMonitoring->exporter($omni, $node, 'monitor');
#	my $prometheus = OmniMonitoring->prometheus($omni, $exporter);
#	is($prometheus->firing, 'OmniRefreshOutage', '...');

package OmniMonitoring;

use strict;
use warnings FATAL => 'all';

use parent -norequire, 'OmniProxy';

use File::Basename qw(dirname);
use File::Spec;
use HTTP::Tiny;
use JSON::PP;
use PostgreSQL::Test::Utils;

use OmniProxy;

my $kit = File::Spec->rel2abs(dirname(__FILE__) . '/../../doc/monitoring');

# A file of the kit
sub file
{
	my ($name) = @_;
	return slurp_file("$kit/$name");
}

# Replaces what must be there; how often does not matter.
sub replace
{
	my ($text, $pattern, $replacement) = @_;

	$text =~ s/$pattern/$replacement/g or die "$pattern is not there\n";
	return $text;
}

# Starts the exporter, which connects as a role.
sub exporter
{
	my ($class, $omni, $node, $role) = @_;
	my $self = $class->prepare($omni, 'exporter');
	my $config = replace(file('sql_exporter.yml'), qr/interval: "\w+"/, 'interval: "200ms"');

	$self->write('exporter.yml', replace($config, qr{postgres://\S+(?=")},
			"postgres://$role\@/postgres?host=" . $node->host . '&port=' . $node->port . '&sslmode=disable'));
	return $self->run(OmniProxy::program('prometheus-sql-exporter'), '-config.file', 'exporter.yml',
		'-web.listen-address', "127.0.0.1:$self->{ports}{exporter}");
}

# Starts Prometheus, to which minutes are seconds.
sub prometheus
{
	my ($class, $omni, $exporter) = @_;
	my $self = $class->prepare($omni, 'prometheus');

	$self->write('alerts.yml', replace(replace(file('alerts.yml'), qr/\[\d+m\]/, '[4s]'), qr/for: \w+/, 'for: 1s'));
	$self->write('prometheus.yml', <<EOF);
global:
  scrape_interval: 250ms
  scrape_timeout: 250ms
  evaluation_interval: 250ms
rule_files:
  - alerts.yml
scrape_configs:
  - job_name: omni_refresh
    static_configs:
      - targets: ['127.0.0.1:$exporter->{ports}{exporter}']
EOF
	return $self->run(OmniProxy::program('prometheus'), '--config.file=prometheus.yml', '--storage.tsdb.path=data',
		"--web.listen-address=127.0.0.1:$self->{ports}{prometheus}");
}

# The exporter's metrics, as a hash of hashes: name, and values of "col"
sub metrics
{
	my ($self) = @_;
	my %metrics;

	foreach my $line (split /\n/, $self->get('exporter', 'metrics')->{content})
	{
		my ($name, $labels) = $line =~ /^(\w+)\{(.*)\} / or next;
		my ($column) = $labels =~ /\bcol="(\w*)"/;
		$metrics{$name}{ $column // '' } = 1;
	}
	return \%metrics;
}

# What Prometheus answers to a request for a path of its API; undef while it is not ready
sub ask
{
	my ($self, $path, %parameters) = @_;
	my $client = HTTP::Tiny->new(http_proxy => undef, proxy => undef);
	my $response = $self->get('prometheus', "api/v1/$path?" . $client->www_form_urlencode(\%parameters));

	return $response->{success} ? decode_json($response->{content})->{data} : undef;
}

# The names of the alerts that are firing, in order
sub firing
{
	my ($self) = @_;
	my $answer = $self->ask('alerts') // { alerts => [] };
	my %names = map { $_->{labels}{alertname} => 1 } grep { $_->{state} eq 'firing' } @{ $answer->{alerts} };

	return join ' ', sort keys %names;
}

sub get
{
	my ($self, $port, $path) = @_;

	return HTTP::Tiny->new(http_proxy => undef, proxy => undef)->get($self->url($port) . "/$path");
}

1;
