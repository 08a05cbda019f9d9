"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const embedded = byId("data");
  let token = "", names = [], columns = [], facts = null, hovering = false;

  // All text is somebody else's: it is only ever set as text.
  function node(name, text, kind) {
    const made = document.createElement(name);
    if (text !== undefined && text !== null) made.textContent = String(text);
    if (kind) made.className = kind;
    if (kind === "text") {
      const held = document.createElement("div");
      held.append(...made.childNodes);
      made.append(held);
    }
    return made;
  }

  const number = (value, digits = 0) => value === null || value === undefined ? "–"
    : value.toLocaleString("en", { maximumFractionDigits: digits });
  function secs(value) {
    if (value === null || value === undefined) return "–";
    if (value < 120) return number(value, 1) + " s";
    if (value < 7200) return number(value / 60, 1) + " min";
    return number(value / 3600, 1) + " h";
  }
  const clock = (iso) => iso ? iso.slice(11, 19) + "Z" : "–";
  const age = (iso) => iso ? secs(Math.max(0, (now() - Date.parse(iso)) / 1000)) : "–";
  const now = () => embedded ? Date.parse(facts.at) : Date.now();
  const column = (name) => columns[names.indexOf(name)] || [];
  function last(name) {
    const values = column(name);
    return values.length ? values[values.length - 1] : null;
  }

  // -- numbers -----------------------------------------------------------------------------
  const TILES = [
    ["Records/s", "records_done", (f) => number(last("records_done"), 1)],
    ["Invocations/s", "invocations", (f) => number(last("invocations"), 1)],
    ["Lag, all partitions", "lag", (f) => number(f.numbers.lag)],
    ["Lag, worst partition", "lag_max", (f) => number(f.numbers.lag_max)],
    ["Oldest unfinished record", "oldest_age", (f) => secs(f.numbers.oldest_age_secs)],
    ["In flight", "in_flight", (f) => number(f.numbers.in_flight) + (f.numbers.limit === null ? "" : " of " + number(f.numbers.limit))],
    ["Records", "records_in", (f) => number(f.numbers.records)],
    ["Errors", "errors", (f) => number(f.numbers.errors)],
    ["Retries", "retries", (f) => number(f.numbers.retries)],
    ["Throttles", "throttles", (f) => number(f.numbers.throttles)],
  ];
  const tiles = TILES.map(([label, name, value]) => {
    const box = node("div"), shown = node("dd"), spark = node("dd");
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    const line = document.createElementNS("http://www.w3.org/2000/svg", "polyline");
    svg.setAttribute("viewBox", "0 0 100 20");
    svg.setAttribute("preserveAspectRatio", "none");
    svg.setAttribute("aria-hidden", "true");
    svg.append(line);
    spark.append(svg);
    box.append(node("dt", label), shown, spark);
    byId("numbers").append(box);
    return () => {
      shown.textContent = value(facts);
      const values = column(name), most = Math.max(1e-9, ...values.map((v) => v || 0));
      line.setAttribute("points", values.map((v, i) =>
        (values.length > 1 ? 100 * i / (values.length - 1) : 0).toFixed(1) + "," + (19 - 18 * (v || 0) / most).toFixed(1)).join(" "));
    };
  });

  // -- plots -------------------------------------------------------------------------------
  const COLORS = ["#1f77b4", "#d9480f", "#2b8a3e", "#9c36b5", "#e03131", "#0c8599", "#846358", "#f08c00", "#868e96"];
  const PLOTS = [
    ["Lag, records", [["all", "lag"], ["worst partition", "lag_max"]]],
    ["Oldest unfinished record, seconds", [["age", "oldest_age"]]],
    ["Records per second", [["read", "records_in"], ["done", "records_done"]]],
    ["Invocation, seconds", [["p50", "p50"], ["p95", "p95"], ["p99", "p99"]]],
    ["Invocations in flight", [["in flight", "in_flight"], ["limit", "limit"]]],
    ["Records of a batch", [["mean", "batch_records"]]],
    ["Batches per second, by what closed them", [["count", "closed_by_count"], ["bytes", "closed_by_bytes"], ["window", "closed_by_window"], ["end", "closed_by_end"], ["alone", "closed_by_alone"]]],
    ["Invocations per second, by outcome", ["success", "partial", "function_error", "invalid_reply", "throttled", "transient", "too_large", "invalid_request", "refused"].map((n) => [n.replace("_", " "), "outcome_" + n]), true],
  ];
  let plots = [];

  function stacked(series) {
    const sums = [];
    return series.map((values) => values.map((v, i) => (sums[i] = (sums[i] || 0) + (v || 0))));
  }
  function dataOf([, series, isStacked]) {
    const values = series.map(([, name]) => column(name));
    return [column("time"), ...(isStacked ? stacked(values) : values)];
  }
  function widthOf(figure) { return Math.max(200, figure.clientWidth - 14); }
  function draw() {
    const style = getComputedStyle(document.documentElement);
    const fore = style.getPropertyValue("--quiet").trim(), line = style.getPropertyValue("--line").trim();
    byId("plots").replaceChildren();
    plots = PLOTS.map((plot) => {
      const figure = node("figure"), caption = node("figcaption", plot[0]), holder = node("div");
      holder.setAttribute("role", "img");
      figure.append(caption, holder);
      byId("plots").append(figure);
      const axis = { stroke: fore, grid: { stroke: line, width: 1 }, ticks: { stroke: line, width: 1 } };
      const made = new uPlot({
        width: widthOf(figure), height: 180, cursor: { drag: { x: false, y: false } },
        scales: { y: { range: (u, low, high) => [0, Math.max(1e-3, (high || 0) * 1.1)] } },
        axes: [{ ...axis }, { ...axis, size: 60, values: (u, vs) => vs.map((v) => number(v, 3)) }],
        series: [{ label: "time" }, ...plot[1].map(([label], i) => ({
          label, stroke: COLORS[i % COLORS.length], width: 1.5, dash: label === "limit" ? [4, 4] : undefined,
          points: { show: column("time").length < 2 }, spanGaps: false,
        }))],
      }, dataOf(plot), holder);
      return { plot, made, figure, holder };
    });
    label();
  }
  function label() {
    for (const { plot, holder } of plots) {
      holder.setAttribute("aria-label", plot[0] + ": " + plot[1].map(([text, name]) => text + " " + number(last(name), 3)).join(", "));
    }
  }
  function redraw() {
    for (const { plot, made } of plots) made.setData(dataOf(plot));
    label();
  }

  // -- tables ------------------------------------------------------------------------------
  const KINDS = { halted: "bad", backing_off: "warn", full: "warn", paused: "warn", reading: "good", idle: "quiet" };
  function fill(id, heads, rows) {
    const table = byId(id), head = node("tr");
    for (const text of heads) {
      const cell = node("th", text);
      cell.scope = "col";
      head.append(cell);
    }
    table.tHead.replaceChildren(head);
    table.tBodies[0].replaceChildren(...rows);
  }
  function cells(...parts) {
    const row = node("tr");
    for (const part of parts) row.append(part instanceof Node ? part : node("td", part));
    return row;
  }
  const count = (value) => node("td", value === null || value === undefined ? "–" : typeof value === "number" ? number(value) : value, "number");
  function button(text, action, body, label, ask) {
    const made = node("button", text);
    made.type = "button";
    made.setAttribute("aria-label", label);
    made.addEventListener("click", () => { if (!ask || confirm(ask)) tell(action, body, made); });
    return made;
  }
  const RANKS = { halted: 0, backing_off: 1, full: 2, paused: 3 };
  const rank = (p) => RANKS[p.state] ?? 4;
  function showPartitions(list, total) {
    list = [...list].sort((a, b) => rank(a) - rank(b) || (b.lag || 0) - (a.lag || 0));
    const wanted = byId("filter").value.trim().toLowerCase();
    const found = list.filter((p) => !wanted || (p.topic + "-" + p.partition + " " + p.state + " " + (p.error_type || "")).toLowerCase().includes(wanted));
    byId("shown").textContent = number(Math.min(50, found.length)) + " of " + number(total) + " shown, worst first";
    if (hovering && token) return; // what is about to be pressed stays where it is
    fill("partitions", ["partition", "state", "lag", "age of oldest", "end", "read", "processed", "committed", "held", "waits for", "attempt", "next try", "last error", ...(token ? ["hands"] : [])],
      found.slice(0, 50).map((p) => {
        const name = node("th", p.topic + "-" + p.partition), state = node("td", p.state.replace("_", " "), "state " + (KINDS[p.state] || ""));
        name.scope = "row";
        const row = cells(name, state, count(p.lag), age(p.oldest), count(p.end), count(p.read), count(p.processed), count(p.committed), count(p.held), p.waits_for || "–", count(p.attempt), clock(p.next_try), node("td", p.error_type || "–", "text"));
        if (token) {
          const where = { topic: p.topic, partition: p.partition }, hands = node("td"), label = p.topic + "-" + p.partition;
          hands.append(p.state === "paused" ? button("Resume", "resume", where, "Resume " + label) : button("Pause", "pause", where, "Pause " + label));
          if (p.state === "backing_off") hands.append(button("Retry now", "retry", where, "Retry " + label + " now"),
            button("Skip", "skip", where, "Skip the record of " + label, "Write the record that " + label + " stands in front of to the error topic, and go on?"));
          row.append(hands);
        }
        return row;
      }));
  }
  function showHalts() {
    byId("halts-section").hidden = !facts.halted.length;
    if (hovering && token) return;
    byId("halts").replaceChildren(...facts.halted.map((h) => {
      const item = node("li"), where = { topic: h.topic, partition: h.partition }, name = h.topic + "-" + h.partition;
      item.append(node("strong", name + " at offset " + h.offset, "bad"), node("span", ": " + h.condition + ", " + h.error_type + (h.message ? ": " + h.message : "") + "; since " + clock(h.since) + ", attempt " + number(h.attempt) + (h.request_id ? ", request id " + h.request_id : "")));
      if (token) {
        const row = node("div", null, "buttons");
        row.append(button("Try again", "resume-halted", where, "Try " + name + " again"),
          button("Skip the record", "skip", { ...where, offset: h.offset }, "Skip the record of " + name, "Write the record at offset " + h.offset + " of " + name + " to the error topic, and go on behind it?"));
        item.append(row);
      }
      const how = node("pre");
      how.append(node("code", h.go_on.join("\n")));
      item.append(how);
      return item;
    }));
  }

  function show() {
    document.title = facts.state + " · " + facts.group;
    byId("title").textContent = facts.group + " → " + facts.function;
    const state = byId("state");
    if (state.textContent !== facts.state) state.textContent = facts.state;
    state.className = facts.state === "running" || facts.state === "ended" ? "good" : facts.state.startsWith("halted") ? "bad" : "warn";
    byId("reason").textContent = facts.reason;
    byId("about").textContent = "up " + secs(facts.numbers.elapsed_secs) + " · version " + facts.version + " · " + facts.runner + " · " + facts.workers + (facts.workers === 1 ? " process" : " processes") + (embedded ? " · as of " + facts.at : "");
    for (const tile of tiles) tile();
    showHalts();
    if (!byId("filter").value.trim() || embedded) showPartitions(facts.partitions, facts.partition_count);
    fill("errors", ["error type", "count", "first", "last", "example", "kind", "request id", ...(facts.errors.some((e) => e.message) ? ["message"] : [])],
      facts.errors.map((e) => cells(node("td", e.error_type, "text"), count(e.count), clock(e.first), clock(e.last), e.topic + "-" + e.partition + " at " + e.offsets[0], e.kind, e.request_id || "–", ...(e.message ? [node("td", e.message, "text")] : []))));
    if (facts.configuration) fill("configuration", ["option", "value", "from"], facts.configuration.map((c) => cells("--" + c.option, node("td", c.value, "text"), c.origin)));
  }

  // -- hands -------------------------------------------------------------------------------
  async function tell(action, body, pressed) {
    const said = byId("said");
    said.textContent = action + " …";
    if (pressed) pressed.disabled = true;
    try {
      const answer = await fetch("api/" + action, { method: "POST", headers: { "Content-Type": "application/json", Authorization: "Bearer " + token }, body: JSON.stringify(body || {}) });
      const told = await answer.json();
      said.textContent = action + ": " + (told.done ? "" : "not done: ") + told.said + (told.partitions && told.partitions.length ? " (" + told.partitions.slice(0, 20).join(" ") + ")" : "");
      said.className = told.done ? "good" : "bad";
      if (answer.status === 401) { token = ""; ready(); }
    } catch (error) {
      said.textContent = action + ": no answer";
      said.className = "bad";
    }
    if (pressed) pressed.disabled = false;
  }
  function ready() {
    byId("actions").hidden = !token;
    byId("token-form").hidden = Boolean(token);
    if (facts) show();
  }
  byId("token-form").addEventListener("submit", (event) => {
    event.preventDefault();
    token = byId("token").value.trim();
    byId("token").value = "";
    ready();
  });
  for (const made of document.querySelectorAll("[data-action]")) made.addEventListener("click", () => tell(made.dataset.action, {}, made));
  byId("level").addEventListener("change", () => tell("log-level", { level: byId("level").value }));
  for (const id of ["partitions", "halts"]) {
    const holds = () => { hovering = byId(id).matches(":hover") || byId(id).contains(document.activeElement); };
    for (const name of ["mouseenter", "mouseleave", "focusin", "focusout"]) byId(id).addEventListener(name, () => setTimeout(holds, 0));
  }

  // -- what comes in -----------------------------------------------------------------------
  async function ask(path) { return (await fetch(path)).json(); }
  async function filtered() {
    if (!facts) return;
    if (embedded || !byId("filter").value.trim()) { show(); return; }
    try {
      const all = await ask("api/status");
      showPartitions(all.partitions, all.partitions.length);
    } catch (error) { /* the stream says that it is away */ }
  }
  byId("filter").addEventListener("input", filtered);
  function take(event) {
    const said = JSON.parse(event.data);
    facts = { ...said.facts, configuration: facts && facts.configuration };
    said.sample.forEach((value, i) => {
      columns[i].push(value);
      if (columns[i].length > 900) columns[i].shift();
    });
    byId("hands").hidden = !facts.hands;
    show();
    redraw();
  }
  addEventListener("resize", () => { for (const { made, figure } of plots) made.setSize({ width: widthOf(figure), height: 180 }); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);

  async function begin() {
    if (embedded) {
      const data = JSON.parse(embedded.textContent);
      ({ names, columns } = data.history);
      facts = data.facts;
      byId("hands").hidden = true;
      show();
      draw();
      return;
    }
    try {
      const [history, first] = await Promise.all([ask("api/history"), ask("api/status")]);
      ({ names, columns } = history);
      facts = first;
      byId("hands").hidden = !facts.hands;
    } catch (error) {
      byId("state").textContent = "the run does not answer";
      setTimeout(begin, 3000);
      return;
    }
    show();
    draw();
    const events = new EventSource("api/events");
    events.onmessage = take;
    events.onerror = () => {
      byId("state").textContent = "the run does not answer";
      byId("state").className = "bad";
      byId("reason").textContent = "it has ended, or the way to it is gone; asked again";
    };
    setInterval(() => { if (byId("filter").value.trim()) filtered(); }, 2000);
  }
  begin();
})();
