() => {
  // One server: when it goes, say so; when one is there again, begin anew with what was typed.
  const root = window.location.pathname.replace(/\/$/, "");
  const box = document.createElement("div");
  box.id = "lost";
  box.hidden = true;
  box.setAttribute("role", "alert");
  box.textContent = "The server does not answer. Start it again with the same command: this page goes on by itself.";
  document.body.append(box);
  const field = () => document.querySelector("#prompt textarea");
  let first = null;
  const look = async () => {
    try {
      const answer = await fetch(root + "/gradio_api/app_id", { cache: "no-store" });
      const id = (await answer.json()).app_id;
      if (first !== null && id !== first) {
        if (field()) sessionStorage.setItem("perflow-prompt", field().value);
        window.location.reload();
        return;
      }
      first = id;
      box.hidden = true;
    } catch (error) {
      box.hidden = false;
    }
  };
  setInterval(look, 2000);
  look();
  const kept = sessionStorage.getItem("perflow-prompt");
  if (kept !== null) {
    sessionStorage.removeItem("perflow-prompt");
    const put = () => {
      if (!field() || !document.querySelector("#picture img")) return setTimeout(put, 100);
      field().value = kept;
      field().dispatchEvent(new Event("input", { bubbles: true }));
    };
    setTimeout(put, 500);
  }
}
