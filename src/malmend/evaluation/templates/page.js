// Filters, sorts and shows the facts.  Whatever a model said is set as text, never as markup.
(() => {
  "use strict";
  const PER_PAGE = 50;
  const LONGEST = 600; // characters of a text in the list; "All answers" shows the whole
  const NAMES = { ES: "Edit prompt", GS: "Paraphrase", NS: "Neighbour", LS: "Unrelated", RS: "Reversed" };
  const facts = JSON.parse(document.getElementById("data").textContent);
  const by = (id) => document.getElementById(id);
  const edited = document.querySelector(".facts").dataset.edited === "yes";
  let page = 0;

  facts.forEach((fact, index) => {
    fact.index = index;
    fact.far = Math.max(-1, ...fact.asked.map((one) => one.kl ?? -1));
    const said = fact.asked.flatMap((one) => [
      one.prompt,
      one.gold,
      ...[one.before, one.after ?? {}].flatMap((its) => [its.text, its.top, its.chat]),
    ]);
    fact.text = [fact.id, fact.prompt, fact.answer, fact.subject, ...said].filter(Boolean).join("\n").toLowerCase();
  });

  const ORDERS = {
    file: (a, b) => a.index - b.index,
    prompt: (a, b) => a.prompt.localeCompare(b.prompt) || a.index - b.index,
    answer: (a, b) => b.length - a.length || a.index - b.index,
    kl: (a, b) => b.far - a.far || a.index - b.index,
  };

  function make(tag, className, text) {
    const element = document.createElement(tag);
    if (className) element.className = className;
    if (text !== undefined) element.textContent = text;
    return element;
  }

  // Text of a user or of a model, in whatever direction it runs.
  function quoted(text, className) {
    const element = make("bdi", className || "said", text === "" ? "(nothing)" : text);
    element.dir = "auto";
    return element;
  }

  function shortened(text) {
    const signs = Array.from(text);
    return signs.length > LONGEST ? `${signs.slice(0, LONGEST).join("")} […]` : text;
  }

  // An answer that decoding cut ends in a sign that says so.
  function answered(text, cut) {
    if (!cut) return [quoted(text)];
    const sign = make("span", "cut", " … (stopped here)");
    sign.title = "only how the answer begins: decoding was stopped here";
    return text === "" ? [sign] : [quoted(text), sign];
  }

  function mark(right) {
    const sign = make("span", right ? "mark good" : "mark bad", right ? "✓" : "✗");
    sign.setAttribute("role", "img");
    sign.setAttribute("aria-label", right ? "right" : "wrong");
    return sign;
  }

  function far(kl) {
    if (kl === 0) return "0";
    return kl >= 0.001 ? kl.toFixed(3) : kl.toExponential(0);
  }

  // What one model replied: its words where it spoke, else what teacher forcing gives.
  function reply(one, whole) {
    const shown = make("div");
    if (!one) return shown;
    const text = one.text ?? one.top;
    const right = one.said ?? one.exact;
    if (right !== undefined) shown.append(mark(right));
    if (text !== undefined) shown.append(...answered(whole ? text : shortened(text), one.cut));
    if (one.tokens !== undefined) {
      const tokens = `${one.right} of ${one.tokens} token${one.tokens === 1 ? "" : "s"}`;
      if (text === undefined) shown.append(make("span", "", tokens));
      else if (whole || one.text === undefined || right !== one.exact) shown.append(make("small", "", `${tokens}, teacher forced`));
    }
    if (one.chat !== undefined && whole) {
      const chat = make("small", "", "in chat: ");
      chat.append(mark(one.chat_said), ...answered(one.chat, one.chat_cut));
      shown.append(chat);
    }
    return shown;
  }

  function cell(label, ...content) {
    const td = make("td");
    if (label) td.dataset.label = label;
    td.append(...content);
    return td;
  }

  // One short line per kind of question beside the edit prompt.
  function tally(fact) {
    const shown = make("div");
    for (const kind of ["GS", "NS", "LS", "RS"]) {
      const stays = (kind === "NS" || kind === "LS") && edited;
      const right = (one) => (one.after ?? one.before).exact; // of a question without an answer nothing
      const asked = fact.asked.filter((one) => one.kind === kind && (stays || right(one) !== undefined));
      if (!asked.length) continue;
      const good = asked.filter((one) => (stays ? !one.moved : right(one))).length;
      const words = { GS: "paraphrases right", NS: `neighbours ${stays ? "as before" : "right"}`, LS: `unrelated ${stays ? "as before" : "right"}`, RS: "reversed right" }[kind];
      shown.append(make("div", "", `${good} of ${asked.length} ${words}`));
    }
    return shown;
  }

  function part(label, ...content) {
    const div = make("div", "part");
    div.dataset.label = label;
    div.append(...content);
    return div;
  }

  function question(one) {
    const item = make("li");
    const head = make("div");
    head.append(make("small", "", NAMES[one.kind] ?? one.kind), quoted(one.prompt));
    if (one.gold !== undefined) head.append(make("span", "answer", " → "), quoted(one.gold, "answer"));
    item.append(head, part(edited ? "Before" : "Answer", reply(one.before, true)));
    if (edited) item.append(part("After", reply(one.after, true)));
    if (one.kl !== undefined) {
      const moved = make("div", "", `KL ${far(one.kl)}`);
      if (one.moved) moved.append(make("small", "", "another top answer"));
      item.append(part("Moved", moved));
    }
    return item;
  }

  function details(fact, width) {
    const row = make("tr", "more");
    const td = make("td");
    td.colSpan = width;
    const list = make("ol");
    list.append(...fact.asked.map(question));
    td.append(list);
    row.append(td);
    return row;
  }

  function show(fact) {
    const row = make("tr", "fact");
    row.dataset.id = fact.id;
    const head = make("th");
    head.scope = "row";
    head.append(quoted(shortened(fact.prompt)), make("span", "answer", " → "), quoted(shortened(fact.answer), "answer"));
    head.append(make("small", "", fact.relation ? `${fact.id} · ${fact.relation}` : fact.id));
    const edit = fact.asked.find((one) => one.kind === "ES") ?? {};
    row.append(head, cell(edited ? "Before" : "Answer", reply(edit.before)));
    if (edited) row.append(cell("After", reply(edit.after)));
    const button = make("button", "", "All answers");
    button.type = "button";
    button.setAttribute("aria-expanded", "false");
    button.addEventListener("click", () => {
      const open = button.getAttribute("aria-expanded") === "true";
      button.setAttribute("aria-expanded", String(!open));
      if (open) row.nextElementSibling.remove();
      else row.after(details(fact, row.children.length));
    });
    row.append(cell("Also asked", tally(fact), button));
    return row;
  }

  function chosen() {
    const filter = document.querySelector("input[name=filter]:checked");
    const words = by("search").value.trim().toLowerCase();
    // An option names the first fact that has its relation: a carriage return in its value would get lost.
    const relation = facts[by("relation")?.value || -1]?.relation;
    const kept = facts.filter(
      (fact) =>
        (filter.value === "all" || fact.flags.includes(filter.value)) &&
        (relation === undefined || fact.relation === relation) &&
        (!words || fact.text.includes(words)),
    );
    by("meaning").textContent = filter.dataset.meaning;
    return kept.sort(ORDERS[by("sort").value]);
  }

  function draw() {
    const kept = chosen();
    const pages = Math.max(1, Math.ceil(kept.length / PER_PAGE));
    page = Math.min(Math.max(page, 0), pages - 1);
    const part = kept.slice(page * PER_PAGE, (page + 1) * PER_PAGE);
    by("rows").replaceChildren(...part.map(show));
    const some = kept.length === facts.length ? "" : `${kept.length.toLocaleString("en")} of `;
    by("shown").textContent = `${some}${facts.length.toLocaleString("en")} fact${facts.length === 1 ? "" : "s"}.`;
    by("page").textContent = `page ${page + 1} of ${pages}`;
    by("previous").disabled = page === 0;
    by("next").disabled = page === pages - 1;
  }

  function turn(step) {
    page += step;
    draw();
    by("facts").scrollIntoView();
    by("facts").focus({ preventScroll: true });
  }

  function again() {
    page = 0;
    draw();
  }

  by("search").addEventListener("input", again);
  for (const one of document.querySelectorAll("input[name=filter], #relation, #sort")) {
    one.addEventListener("change", again);
  }
  by("previous").addEventListener("click", () => turn(-1));
  by("next").addEventListener("click", () => turn(1));
  by("browser").hidden = false;
  draw();
})();
