CREATE TABLE IF NOT EXISTS adapters (
    id VARCHAR(64) NOT NULL,
    tenant VARCHAR(64) NOT NULL,
    prefix VARCHAR(200) NOT NULL,
    bytes BIGINT NOT NULL,
    created_at FLOAT NOT NULL,
    expires_at FLOAT,
    body JSON NOT NULL,
    PRIMARY KEY (id)
);

CREATE INDEX IF NOT EXISTS adapters_by_tenant ON adapters (tenant, id);

CREATE INDEX IF NOT EXISTS adapters_expiring ON adapters (expires_at);

CREATE TABLE IF NOT EXISTS api_keys (
    id VARCHAR(64) NOT NULL,
    tenant VARCHAR(40) NOT NULL,
    name VARCHAR(100) NOT NULL,
    hint VARCHAR(20) NOT NULL,
    mac VARCHAR(64) NOT NULL,
    scopes JSON NOT NULL,
    created_at FLOAT NOT NULL,
    expires_at FLOAT,
    revoked_at FLOAT,
    last_used_at FLOAT,
    PRIMARY KEY (id),
    UNIQUE (mac)
);

CREATE INDEX IF NOT EXISTS api_keys_by_tenant ON api_keys (tenant, id);

CREATE TABLE IF NOT EXISTS audit (
    sequence SERIAL NOT NULL,
    at FLOAT NOT NULL,
    tenant VARCHAR(40) NOT NULL,
    actor VARCHAR(80) NOT NULL,
    action VARCHAR(60) NOT NULL,
    target VARCHAR(200),
    status INTEGER NOT NULL,
    request_id VARCHAR(64),
    PRIMARY KEY (sequence)
);

CREATE INDEX IF NOT EXISTS audit_by_tenant ON audit (tenant, sequence);

CREATE TABLE IF NOT EXISTS batch_adapters (
    batch_id VARCHAR(64) NOT NULL,
    adapter_id VARCHAR(64) NOT NULL,
    position INTEGER NOT NULL,
    canary INTEGER NOT NULL,
    state VARCHAR(16) NOT NULL,
    realignment_id VARCHAR(64),
    tries INTEGER NOT NULL,
    next_at FLOAT,
    error JSON,
    similarity FLOAT,
    edit FLOAT,
    PRIMARY KEY (batch_id, adapter_id)
);

CREATE INDEX IF NOT EXISTS batch_adapters_by_batch ON batch_adapters (batch_id, state, position);

CREATE INDEX IF NOT EXISTS batch_adapters_by_state ON batch_adapters (state);

CREATE TABLE IF NOT EXISTS batches (
    id VARCHAR(64) NOT NULL,
    tenant VARCHAR(40) NOT NULL,
    state VARCHAR(16) NOT NULL,
    request JSON NOT NULL,
    reason VARCHAR(300),
    webhook_endpoint_id VARCHAR(64),
    idempotency_key VARCHAR(255),
    request_hash VARCHAR(64),
    created_at FLOAT NOT NULL,
    finished_at FLOAT,
    PRIMARY KEY (id),
    CONSTRAINT one_batch_per_idempotency_key UNIQUE (tenant, idempotency_key)
);

CREATE INDEX IF NOT EXISTS batches_by_state ON batches (state);

CREATE INDEX IF NOT EXISTS batches_by_tenant ON batches (tenant, id);

CREATE TABLE IF NOT EXISTS events (
    sequence SERIAL NOT NULL,
    realignment_id VARCHAR(64) NOT NULL,
    created_at FLOAT NOT NULL,
    type VARCHAR(40) NOT NULL,
    message VARCHAR(1000) NOT NULL,
    data JSON NOT NULL,
    PRIMARY KEY (sequence)
);

CREATE INDEX IF NOT EXISTS events_by_realignment ON events (realignment_id, sequence);

CREATE TABLE IF NOT EXISTS files (
    id VARCHAR(64) NOT NULL,
    tenant VARCHAR(40) NOT NULL,
    prefix VARCHAR(200) NOT NULL,
    filename VARCHAR(255) NOT NULL,
    purpose VARCHAR(40) NOT NULL,
    bytes BIGINT NOT NULL,
    sha256 VARCHAR(64) NOT NULL,
    created_at FLOAT NOT NULL,
    expires_at FLOAT,
    PRIMARY KEY (id)
);

CREATE INDEX IF NOT EXISTS files_by_tenant ON files (tenant, id);

CREATE INDEX IF NOT EXISTS files_expiring ON files (expires_at);

CREATE TABLE IF NOT EXISTS options (
    name VARCHAR(60) NOT NULL,
    value JSON NOT NULL,
    PRIMARY KEY (name)
);

CREATE TABLE IF NOT EXISTS realignments (
    id VARCHAR(64) NOT NULL,
    tenant VARCHAR(64) NOT NULL,
    state VARCHAR(16) NOT NULL,
    attempt INTEGER NOT NULL,
    lease_until FLOAT,
    worker VARCHAR(200),
    ticket VARCHAR(64),
    next_at FLOAT,
    announced INTEGER NOT NULL,
    cancel_requested INTEGER NOT NULL,
    adapter_id VARCHAR(64) NOT NULL,
    reference_id VARCHAR(64) NOT NULL,
    request JSON NOT NULL,
    api VARCHAR(20) NOT NULL,
    batch_id VARCHAR(64),
    webhook_endpoint_id VARCHAR(64),
    traceparent VARCHAR(64),
    training_file VARCHAR(80),
    idempotency_key VARCHAR(255),
    request_hash VARCHAR(64),
    progress JSON,
    result JSON,
    result_attempt INTEGER,
    result_bytes BIGINT NOT NULL,
    error JSON,
    created_at FLOAT NOT NULL,
    started_at FLOAT,
    attempt_started_at FLOAT,
    finished_at FLOAT,
    expires_at FLOAT,
    PRIMARY KEY (id),
    CONSTRAINT one_job_per_idempotency_key UNIQUE (tenant, idempotency_key)
);

CREATE INDEX IF NOT EXISTS realignments_by_batch ON realignments (batch_id);

CREATE INDEX IF NOT EXISTS realignments_by_bytes ON realignments (tenant, result_bytes);

CREATE INDEX IF NOT EXISTS realignments_by_request ON realignments (tenant, request_hash, idempotency_key, id);

CREATE INDEX IF NOT EXISTS realignments_by_state ON realignments (tenant, state, id);

CREATE INDEX IF NOT EXISTS realignments_by_tenant ON realignments (tenant, id);

CREATE INDEX IF NOT EXISTS realignments_by_turn ON realignments (tenant, attempt_started_at);

CREATE INDEX IF NOT EXISTS realignments_due ON realignments (state, next_at);

CREATE INDEX IF NOT EXISTS realignments_expiring ON realignments (expires_at);

CREATE TABLE IF NOT EXISTS tenants (
    id VARCHAR(40) NOT NULL,
    created_at FLOAT NOT NULL,
    max_bytes BIGINT,
    max_jobs INTEGER,
    max_requests_per_second INTEGER,
    PRIMARY KEY (id)
);

CREATE TABLE IF NOT EXISTS totals (
    name VARCHAR(60) NOT NULL,
    first VARCHAR(60) NOT NULL,
    second VARCHAR(60) NOT NULL,
    value FLOAT NOT NULL,
    PRIMARY KEY (name, first, second)
);

CREATE TABLE IF NOT EXISTS upload_parts (
    id VARCHAR(64) NOT NULL,
    upload_id VARCHAR(64) NOT NULL,
    tenant VARCHAR(40) NOT NULL,
    bytes BIGINT NOT NULL,
    sha256 VARCHAR(64),
    created_at FLOAT NOT NULL,
    PRIMARY KEY (id)
);

CREATE INDEX IF NOT EXISTS upload_parts_by_tenant ON upload_parts (tenant);

CREATE INDEX IF NOT EXISTS upload_parts_by_upload ON upload_parts (upload_id, id);

CREATE TABLE IF NOT EXISTS uploads (
    id VARCHAR(64) NOT NULL,
    tenant VARCHAR(40) NOT NULL,
    state VARCHAR(16) NOT NULL,
    prefix VARCHAR(200) NOT NULL,
    filename VARCHAR(255) NOT NULL,
    purpose VARCHAR(40) NOT NULL,
    mime_type VARCHAR(200) NOT NULL,
    bytes BIGINT NOT NULL,
    request JSON NOT NULL,
    file_id VARCHAR(64),
    created_at FLOAT NOT NULL,
    expires_at FLOAT NOT NULL,
    PRIMARY KEY (id)
);

CREATE INDEX IF NOT EXISTS uploads_by_tenant ON uploads (tenant, id);

CREATE INDEX IF NOT EXISTS uploads_expiring ON uploads (expires_at);

CREATE TABLE IF NOT EXISTS webhook_deliveries (
    id VARCHAR(64) NOT NULL,
    tenant VARCHAR(40) NOT NULL,
    endpoint_id VARCHAR(64) NOT NULL,
    type VARCHAR(60) NOT NULL,
    payload JSON NOT NULL,
    state VARCHAR(16) NOT NULL,
    attempts INTEGER NOT NULL,
    step INTEGER NOT NULL,
    next_at FLOAT,
    lease_until FLOAT,
    last_status INTEGER,
    last_error VARCHAR(300),
    history JSON,
    created_at FLOAT NOT NULL,
    finished_at FLOAT,
    PRIMARY KEY (id)
);

CREATE INDEX IF NOT EXISTS webhook_deliveries_by_endpoint ON webhook_deliveries (tenant, endpoint_id, id);

CREATE INDEX IF NOT EXISTS webhook_deliveries_due ON webhook_deliveries (state, next_at);

CREATE TABLE IF NOT EXISTS webhook_endpoints (
    id VARCHAR(64) NOT NULL,
    tenant VARCHAR(40) NOT NULL,
    url VARCHAR(2000) NOT NULL,
    name VARCHAR(100) NOT NULL,
    events JSON NOT NULL,
    secret VARCHAR(500) NOT NULL,
    previous_secret VARCHAR(500),
    previous_until FLOAT,
    created_at FLOAT NOT NULL,
    disabled_at FLOAT,
    disabled_reason VARCHAR(200),
    failing_since FLOAT,
    PRIMARY KEY (id)
);

CREATE INDEX IF NOT EXISTS webhook_endpoints_by_tenant ON webhook_endpoints (tenant, id);

CREATE TABLE IF NOT EXISTS workers (
    name VARCHAR(200) NOT NULL,
    device VARCHAR(20) NOT NULL,
    version VARCHAR(40) NOT NULL,
    started_at FLOAT NOT NULL,
    seen_at FLOAT NOT NULL,
    draining INTEGER NOT NULL,
    PRIMARY KEY (name)
);

CREATE OR REPLACE FUNCTION audit_refuse() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN RAISE EXCEPTION 'audit rows are only ever added'; END $$;

CREATE TRIGGER audit_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON audit
    FOR EACH STATEMENT EXECUTE FUNCTION audit_refuse();

CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL, CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num));

INSERT INTO alembic_version VALUES ('0001');
