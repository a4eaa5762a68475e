// The page's script: hands the controls' values to the server, and shows the pictures that come back.
// Nothing is fetched from anywhere but the server that the page came from.
window.perflow = (() => {
  const NAMES = ["prompt", "negative_prompt", "seed", "steps", "guidance_scale", "accelerator_scale", "stock",
    "stock_steps", "stock_guidance_scale", "strength"];
  const KEPT = 48; // pictures of the gallery
  const LARGE = 500000; // characters of a PNG that becomes a blob: long addresses cannot be saved
  const SETTLED = 1000; // ms that a picture must stand, to be kept beside its successor
  const $ = (selector) => document.querySelector(selector);
  const name = [...crypto.getRandomValues(new Uint8Array(16))].map((b) => b.toString(16).padStart(2, "0")).join("");
  const at = (path) => new URL("perflow/" + path, document.baseURI).href;
  let values = null; // of all controls, as they were last seen
  let wanted = "text"; // or "image"
  let number = 0, shown = 0, sent = "", queued = false;
  let about = null, instance = null, models = 0, canvasSize = [256, 256];
  let next = null; // values that the controls are to take
  const gallery = [];

  // Asking

  const send = () => {
    if (queued || values === null) return;
    queued = true; // several changes at once are one wish
    queueMicrotask(() => { queued = false; draw(); });
  };
  const wish = (now) => {
    values = now;
    if (JSON.stringify([wanted, values]) !== sent) send();
  };
  const draw = async (again = false) => {
    const mine = ++number, asked = { mode: wanted, values };
    sent = JSON.stringify([wanted, values]);
    let response;
    try {
      response = await fetch(at("draw"), { method: "POST", headers: { "Content-Type": "application/json" },
        body: JSON.stringify({ window: name, number: mine, ...asked }) });
      if (!response.ok) return note((await response.json()).text, "error");
      const reader = response.body.getReader(), decoder = new TextDecoder();
      let rest = "";
      for (;;) {
        const { done, value } = await reader.read();
        if (done) return;
        const lines = (rest + decoder.decode(value, { stream: true })).split("\n");
        rest = lines.pop();
        for (const line of lines) show(JSON.parse(line), mine, asked, again);
      }
    } catch (error) {
      if (!(error instanceof TypeError)) throw error;
      sent = "";
      if (mine === number) look(); // the server has gone
    }
  };

  // Showing

  const show = (said, mine, asked, again) => {
    if (said.kind === "failed") {
      if (mine !== number) return;
      if (said.missing && touched && !again) return post().then((ok) => ok && draw(true));
      return note(said.text, "error");
    }
    if (said.kind === "superseded" || mine < shown) return; // an older picture does not replace a newer one
    if (said.kind === "picture") {
      shown = mine;
      figure($("#picture"), said);
      note(said.note);
      $("#code code").textContent = said.code;
      $("#input-png").hidden = asked.mode !== "image";
    } else if (said.kind === "comparison") {
      figure($("#stock-picture"), said);
      $(".curtain").hidden = "none" in said;
    } else if (said.kind === "states") {
      strip(said.states);
      keep(asked);
    }
    fit();
  };
  const address = (png) => {
    if (png.length < LARGE) return "data:image/png;base64," + png;
    const bytes = Uint8Array.from(atob(png), (c) => c.charCodeAt(0));
    return URL.createObjectURL(new Blob([bytes], { type: "image/png" }));
  };
  const figure = (element, said) => {
    const image = element.querySelector("img"), save = element.querySelector(".save");
    const empty = element.querySelector(".empty"), none = "none" in said;
    image.hidden = save.hidden = none;
    empty.hidden = !none;
    if (none) {
      empty.textContent = said.none;
      element.querySelector("b").textContent = "without";
      element.querySelector(".facts").textContent = "";
      return;
    }
    const former = image.src, source = address(said.png);
    image.src = source;
    image.alt = said.alt;
    image.dataset.side = said.width;
    save.href = source;
    save.download = said.name;
    element.querySelector("b").textContent = said.title;
    element.querySelector(".facts").textContent = said.facts;
    for (const copy of document.querySelectorAll(element.id === "picture" ? ".curtain .over" : ".curtain .frame:not(.over)")) {
      copy.src = source;
      copy.dataset.side = said.width;
    }
    if (former.startsWith("blob:") && !gallery.some((entry) => entry.source === former)) URL.revokeObjectURL(former);
  };
  const strip = (states) => {
    const place = $("#states .strip");
    while (place.children.length > states.length) place.lastChild.remove();
    states.forEach((png, index) => {
      if (!place.children[index]) {
        const one = document.createElement("figure");
        one.append(document.createElement("img"), document.createElement("figcaption"));
        one.lastChild.textContent = "step " + (index + 1);
        one.firstChild.alt = "Foreseen after step " + (index + 1);
        place.append(one);
      }
      place.children[index].firstChild.src = "data:image/png;base64," + png;
    });
  };
  // Small pictures are enlarged by a whole number of the screen's own pixels, and stay sharp.
  const fit = () => {
    const ratio = window.devicePixelRatio || 1;
    for (const image of document.querySelectorAll("img.frame[data-side]")) {
      const room = Math.min(image.closest(".block").clientWidth || 384, 512);
      const side = Number(image.dataset.side), factor = Math.floor((room * ratio) / side);
      image.style.width = (factor >= 2 ? (factor * side) / ratio : room) + "px";
      image.classList.toggle("smooth", factor < 2);
      if (image.parentElement.tagName === "FIGURE") image.parentElement.style.maxWidth = image.style.width;
    }
    const picture = $("#picture img.frame"), curtain = $(".curtain");
    if (picture && curtain) curtain.style.width = picture.style.width;
  };
  const said = (place, text, kind) => {
    const element = $(place + " .prose") || $(place);
    if (!element || (element.dataset.said === (kind || "") + text)) return;
    element.dataset.said = (kind || "") + text;
    element.replaceChildren();
    if (!text) return;
    const box = document.createElement("div");
    box.className = "message " + (kind || "note");
    box.setAttribute("role", kind === "error" ? "alert" : "status");
    box.textContent = text;
    element.append(box);
  };
  const note = (text, kind) => said("#note", text || "", kind);

  // The gallery

  const keep = (asked) => {
    const source = $("#picture img").src, now = Date.now();
    if (gallery.length && gallery[0].source === source) return;
    if (gallery.length && now - gallery[0].since < SETTLED) gallery.shift();
    const save = $("#picture .save");
    gallery.unshift({ source, asked, since: now, name: save.download, alt: $("#picture img").alt });
    while (gallery.length > KEPT) URL.revokeObjectURL(gallery.pop().source);
    $("#shots .shots").replaceChildren(...gallery.map(entry));
  };
  const entry = (kept) => {
    const one = document.createElement("figure"), button = document.createElement("button");
    const image = document.createElement("img"), save = document.createElement("a");
    image.src = save.href = kept.source;
    image.alt = kept.alt;
    button.type = "button";
    button.title = kept.alt;
    button.setAttribute("aria-label", "Take the settings of " + kept.alt);
    button.append(image);
    button.addEventListener("click", () => take(kept.asked.values));
    save.download = kept.name;
    save.textContent = "PNG";
    save.setAttribute("aria-label", "Save the PNG of " + kept.alt);
    one.append(button, save);
    return one;
  };

  // The controls

  const take = (now) => {
    values = values === null ? now : now.map((value, index) => (value === null ? values[index] : value));
    next = values;
    if (api.hands) api.hands();
    send();
  };
  const changed = (what) => {
    if (values === null) return;
    take(NAMES.map((one) => (one in what ? what[one] : null)));
  };

  // The picture to begin from

  let touched = false, posting = null, pen = null;
  const past = [];
  const canvas = () => $("#upload canvas");
  const post = async () => {
    const blob = await new Promise((done) => canvas().toBlob(done, "image/png"));
    const link = $("#input-png");
    try {
      const response = await fetch(at("image?window=" + name), { method: "POST", body: blob });
      if (!response.ok) { note((await response.json()).text, "error"); return false; }
      if (link.href.startsWith("blob:")) URL.revokeObjectURL(link.href);
      link.href = URL.createObjectURL(await response.blob());
      return true;
    } catch (error) {
      look();
      return false;
    }
  };
  const drawn = () => { // the picture follows the pen, too
    touched = true;
    if (posting !== null) return;
    posting = setTimeout(async () => { posting = null; if (await post()) draw(); }, 120);
  };
  const remember = () => {
    past.push(canvas().toDataURL());
    if (past.length > 20) past.shift();
  };
  const blank = () => {
    const pad = canvas(), paper = pad.getContext("2d");
    paper.fillStyle = "#ffffff";
    paper.fillRect(0, 0, pad.width, pad.height);
  };
  const put = async (blob) => {
    const image = await createImageBitmap(blob), pad = canvas();
    pad.getContext("2d").drawImage(image, 0, 0, pad.width, pad.height);
  };
  const uploaded = async (file) => {
    if (!file) return;
    try {
      const response = await fetch(at("image?window=" + name), { method: "POST", body: file });
      if (!response.ok) return note((await response.json()).text, "error");
      remember();
      await put(await response.blob());
      drawn();
    } catch (error) {
      look();
    }
  };
  const easel = () => {
    const pad = canvas(), paper = pad.getContext("2d");
    const where = (event) => {
      const box = pad.getBoundingClientRect();
      return [((event.clientX - box.left) * pad.width) / box.width, ((event.clientY - box.top) * pad.height) / box.height];
    };
    const line = (from, to) => {
      paper.strokeStyle = $("#brush-colour").value;
      paper.lineWidth = (Number($("#brush-size").value) * pad.width) / 256;
      paper.lineCap = paper.lineJoin = "round";
      paper.beginPath();
      paper.moveTo(...from);
      paper.lineTo(...to);
      paper.stroke();
      drawn();
    };
    blank();
    pad.addEventListener("pointerdown", (event) => {
      pad.setPointerCapture(event.pointerId);
      remember();
      pen = where(event);
      line(pen, pen);
    });
    pad.addEventListener("pointermove", (event) => {
      if (pen === null) return;
      const to = where(event);
      line(pen, to);
      pen = to;
    });
    for (const end of ["pointerup", "pointercancel"]) pad.addEventListener(end, () => { pen = null; });
    $("#upload input[type=file]").addEventListener("change", (event) => {
      uploaded(event.target.files[0]);
      event.target.value = "";
    });
    $("#undo").addEventListener("click", async () => {
      if (!past.length) return;
      await put(await (await fetch(past.pop())).blob());
      drawn();
    });
    $("#clear").addEventListener("click", () => { remember(); blank(); drawn(); });
  };

  // The server

  const lost = (gone) => { $("#lost").hidden = !gone; };
  let timer = null, looking = false;
  const look = async () => {
    if (looking) return;
    looking = true;
    clearTimeout(timer);
    let wait = 2000;
    try {
      const now = await (await fetch(at("status"), { cache: "no-store" })).json();
      lost(false);
      const kind = { opening: "busy", failed: "error" }[now.state];
      said("#status", kind ? now.text : "", kind);
      if (now.state === "opening") wait = 400;
      $("#head p").textContent = now.about;
      if (now.values !== null && now.state !== "opening" && (instance !== now.instance || models !== now.number)) {
        const size = now.canvas, other = canvas();
        if (size && (other.width !== size[0] || other.height !== size[1])) {
          [other.width, other.height] = size;
          past.length = 0;
          touched = false;
          blank();
        }
        if (about !== now.about) {
          take(values === null || !values[0] ? now.values : [null, null, null, ...now.values.slice(3)]);
        } else {
          sent = "";
          send(); // the same model in a server that was started anew: go on
        }
        [about, instance, models] = [now.about, now.instance, now.number];
      }
    } catch (error) {
      if (!(error instanceof TypeError) && !(error instanceof SyntaxError)) throw error;
      lost(true);
      wait = 1000;
    } finally {
      looking = false;
      timer = setTimeout(look, wait);
    }
  };

  // The beginning: Gradio builds the page after this script has run.

  const begin = () => {
    if (!$("#code pre") || !$("#upload canvas") || !$("#load-png input") || !$("#states .strip") || !api.hands) {
      return setTimeout(begin, 30);
    }
    const gone = document.createElement("div");
    gone.id = "lost";
    gone.hidden = true;
    gone.setAttribute("role", "alert");
    gone.textContent = "The server does not answer. Start it again with the same command: this page goes on by itself.";
    document.body.append(gone);
    easel();
    $("#load-png input").addEventListener("change", async (event) => {
      const file = event.target.files[0];
      event.target.value = "";
      if (!file) return;
      try {
        const response = await fetch(at("settings"), { method: "POST", body: file });
        const answer = await response.json();
        if (!response.ok) return note(answer.text, "error");
        take(answer.values);
      } catch (error) {
        look();
      }
    });
    $(".curtain input").addEventListener("input", (event) => {
      event.target.parentElement.style.setProperty("--at", event.target.value + "%");
    });
    $("#copy").addEventListener("click", async (event) => {
      const text = $("#code code").textContent;
      try {
        await navigator.clipboard.writeText(text);
      } catch (error) { // no clipboard without https but on this machine
        getSelection().selectAllChildren($("#code code"));
        document.execCommand("copy");
      }
      event.target.textContent = "Copied";
      setTimeout(() => { event.target.textContent = "Copy"; }, 1500);
    });
    new ResizeObserver(fit).observe($("#results"));
    addEventListener("pagehide", () => navigator.sendBeacon(at("leave?window=" + name)));
    addEventListener("pageshow", (event) => { if (event.persisted) { sent = ""; send(); } });
    look();
  };

  const api = {
    hands: null, // set by a hidden component: asks `given` for values and puts them into the controls
    wish,
    given: () => next,
    tab: (tab) => {
      document.body.dataset.tab = tab;
      if (tab !== "text" && tab !== "image") return; // the gallery and the model go with either
      wanted = tab;
      if (JSON.stringify([wanted, values]) !== sent) send();
    },
    renew: () => changed({ seed: crypto.getRandomValues(new Uint32Array(1))[0] >>> 1 }),
    suggest: async () => {
      try {
        changed({ prompt: (await (await fetch(at("suggest"), { cache: "no-store" })).json()).prompt });
      } catch (error) {
        look();
      }
    },
    open: async (model, accelerator) => {
      try {
        const response = await fetch(at("open"), { method: "POST", headers: { "Content-Type": "application/json" },
          body: JSON.stringify({ model, accelerator }) });
        if (!response.ok) return said("#status", (await response.json()).text, "error");
      } catch (error) { /* look says so */ }
      look();
    },
  };
  begin();
  return api;
})();
